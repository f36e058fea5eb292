// x W^T for at most 16 rows of x: decoding.
//
// A block owns 16 outputs (rows of W); its 8 warps cut K into 8 ranges, whose boundaries depend on K alone, and their sums are added
// in order. A warp multiplies 16 rows of W with all of x (mma m16n8k16 for 16-bit types), 32 columns a step.
//   bytes: N K sizeof(T) once; x, rows K sizeof(T), again for each block, from L2; flops: 2 N K a row, on 8 or 16 rows at a time
//   bound: memory (W)
// Nothing is staged in shared memory: an element of W is used by one warp. A lane's 16 bytes are 8 neighbours of K where mma wants
// 2 + 2 + 2 + 2; since x is loaded in the same way, the products are the right ones in another order.
#pragma once
#include "common/launch.cuh"
#include "common/matrix_rows.cuh"
#include "common/shared.cuh"
#include "linear/linear_cuda.h"

namespace hybrid::cuda {

constexpr int kSkinnyWarps = 8;
constexpr int kSkinnyOutputs = 16;
constexpr int kSkinnyStep = 32;  // columns

using SkinnyTile = float[kSkinnyOutputs][kSkinnyRows + 1];  // one more float: fewer bank conflicts

// Lane 4g + t: columns 8t .. 8t + 8 of rows g and g + 8 of W and of x.
template <typename T>
__device__ __forceinline__ void multiply_range(const MatrixRows<T>& weight, const MatrixRows<T>& x, int64_t begin, int64_t end,
                                               SkinnyTile& out) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  float sum[2][4] = {};
#pragma unroll 4
  for (int64_t base = begin; base < end; base += kSkinnyStep) {
    const int64_t col = base + 8 * t;
    const uint4 upper = weight.load(g, col), lower = weight.load(g + 8, col);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half * 8 >= x.count) break;
      const uint4 row = x.load(8 * half + g, col);
      mma_m16n8k16<T>(sum[half], {upper.x, lower.x, upper.y, lower.y}, {row.x, row.y});
      mma_m16n8k16<T>(sum[half], {upper.z, lower.z, upper.w, lower.w}, {row.z, row.w});
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[g + i / 2 * 8][8 * half + 2 * t + i % 2] = sum[half][i];
  }
}

// fp32: a lane owns one row of W and 8 rows of x, and adds in order of K.
__device__ __forceinline__ void multiply_range(const MatrixRows<float>& weight, const MatrixRows<float>& x, int64_t begin,
                                               int64_t end, SkinnyTile& out) {
  constexpr int kOwn = kSkinnyRows / 2;
  const int output = threadIdx.x % kSkinnyOutputs, first = static_cast<int>(threadIdx.x) / kSkinnyOutputs * kOwn;
  float sum[kOwn] = {};
#pragma unroll 1
  for (int64_t col = begin; col < end; col += kPack<float>) {
    const uint4 w = weight.load(output, col);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const uint4 row = x.load(first + i, col);
#pragma unroll
      for (int j = 0; j < kPack<float>; ++j) sum[i] = fmaf(element<float>(w, j), element<float>(row, j), sum[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) out[output][first + i] = sum[i];
}

// The low-rank term of one element; the products of a rank in order.
template <typename T>
__device__ __forceinline__ float low_rank(const SkinnyLinearParams<T>& p, int64_t row, int64_t output) {
  int split = 0;
#pragma unroll
  for (int i = 0; i < kMaxLinearSplits; ++i) split += i < p.splits && output >= p.split_end[i];
  const float* inner = p.inner + (row * p.splits + split) * p.rank;
  const T* b = p.lora_b + output * p.rank;
  float sum = 0.0f;
  for (int r = 0; r < p.rank; ++r) sum = fmaf(inner[r], to_float(b[r]), sum);
  return p.scale * sum;
}

// kInner: x A^T to `inner`, in place of x W^T to y.
template <typename T, bool kInner>
__global__ void __launch_bounds__(kWarpSize* kSkinnyWarps) skinny_linear_kernel(SkinnyLinearParams<T> p, bool aligned) {
  struct Sums {
    SkinnyTile of_warp[kSkinnyWarps];
  };
  Sums& sums = shared_memory<Sums>();
  const int64_t outputs = kInner ? p.splits * p.rank : p.N;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSkinnyOutputs;
  const int warp = threadIdx.y;
  const int64_t range = round_up(ceil_div(p.K, kSkinnyWarps), kSkinnyStep), begin = warp * range;
  const MatrixRows<T> weight{(kInner ? p.lora_a : p.weight) + first * p.K, p.K,
                             static_cast<int>(smaller(outputs - first, kSkinnyOutputs)), aligned};
  const MatrixRows<T> x{p.x, p.K, static_cast<int>(p.rows), aligned};
  multiply_range(weight, x, begin, smaller(begin + range, p.K), sums.of_warp[warp]);
  __syncthreads();

  const int thread = warp * kWarpSize + threadIdx.x;  // one element each
  const int64_t row = thread / kSkinnyOutputs, output = first + thread % kSkinnyOutputs;
  if (row >= p.rows || output >= outputs) return;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kSkinnyWarps; ++i) sum += sums.of_warp[i][thread % kSkinnyOutputs][row];
  if constexpr (kInner) {
    p.inner[row * outputs + output] = sum;
  } else {
    if (p.bias != nullptr) sum += to_float(p.bias[output]);
    if (p.rank > 0) sum += low_rank(p, row, output);
    p.y[row * outputs + output] = round_to<T>(sum);
  }
}

template <typename T>
void skinny_linear(const SkinnyLinearParams<T>& p, Stream stream) {
  static_assert(kWarpSize * kSkinnyWarps == kSkinnyOutputs * kSkinnyRows);
  if (p.rows == 0 || p.N == 0) return;
  const dim3 block(kWarpSize, kSkinnyWarps);
  const auto grid = [](int64_t outputs) { return dim3(static_cast<unsigned>(ceil_div(outputs, kSkinnyOutputs))); };
  if (p.rank > 0) {
    launch(skinny_linear_kernel<T, true>, {grid(p.splits * p.rank), block}, stream, p, packs_aligned(p.K, p.x, p.lora_a));
  }
  launch(skinny_linear_kernel<T, false>, {grid(p.N), block}, stream, p, packs_aligned(p.K, p.x, p.weight));
}

}  // namespace hybrid::cuda
