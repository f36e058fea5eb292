// x W^T for at most 16 rows of x: decoding.
//
// A block owns 16 outputs (rows of W); its 8 warps cut K into 8 ranges, whose boundaries depend on K alone, and their sums are added
// in order. A warp multiplies 16 rows of W with all of x (mma m16n8k16 for 16-bit types), 32 columns a step. The epilogue adds the bias
// and a low-rank term, and may take an activation: of a gated one the block owns 8 outputs, a row of gate and one of up for each.
//   bytes: N K sizeof(T) once; x, rows K sizeof(T), again for each block, from L2; flops: 2 N K a row, on 8 or 16 rows at a time
//   bound: memory (W)
// Nothing is staged in shared memory: an element of W is used by one warp. A lane's 16 bytes are 8 neighbours of K where mma wants
// 2 + 2 + 2 + 2; since x is loaded in the same way, the products are the right ones in another order.
#pragma once
#include "activation/functions.cuh"
#include "common/launch.cuh"
#include "common/matrix_rows.cuh"
#include "common/shared.cuh"
#include "linear/linear_cuda.h"

namespace hybrid::cuda {

constexpr int kSkinnyWarps = 8;
constexpr int kSkinnyOutputs = 16;
constexpr int kSkinnyStep = 32;  // columns
constexpr int kSkinnyAhead = 4;  // steps whose part of W is on its way at once: 8 loads of 16 bytes a lane

constexpr int kSkinnyBlocks = 2;  // of a multiprocessor, at least: registers enough for what is on its way

using SkinnyTile = float[kSkinnyOutputs][kSkinnyRows + 1];  // one more float: fewer bank conflicts

// What becomes of the sums.
enum class SkinnyOutput {
  kInner,      // of x A^T: fp32, for the low-rank term
  kLinear,
  kActivated,  // act(y)
  kGated,      // act(gate) up of y = gate | up
};

// The block's rows of W: neighbours, or 8 of the gate and, behind them, 8 of up.
template <typename T>
struct SkinnyWeight {
  MatrixRows<T> low, high;  // rows 0 .. 8 and 8 .. 16

  __device__ __forceinline__ SkinnyWeight(const T* weight, int64_t K, int64_t low_row, int64_t high_row, int64_t low_end,
                                          int64_t high_end, bool aligned)
      : low{weight + low_row * K, K, count(low_row, low_end), aligned}, high{weight + high_row * K, K, count(high_row, high_end), aligned} {}
  static __device__ __forceinline__ int count(int64_t row, int64_t end) {
    return static_cast<int>(smaller(end - row, kSkinnyOutputs / 2));
  }
  __device__ __forceinline__ uint4 load(int row, int64_t col) const {
    return row < kSkinnyOutputs / 2 ? low.load(row, col) : high.load(row - kSkinnyOutputs / 2, col);
  }
};

// Lane 4g + t: columns 8t .. 8t + 8 of rows g and g + 8 of W and of x.
template <typename T>
__device__ __forceinline__ void multiply_range(const SkinnyWeight<T>& weight, const MatrixRows<T>& x, int64_t begin, int64_t end,
                                               SkinnyTile& out) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto load = [&](const MatrixRows<T>& rows, int row, int64_t col) { return col < end ? rows.load(row, col) : uint4{}; };
  float sum[2][4] = {};
#pragma unroll 1
  for (int64_t base = begin; base < end; base += kSkinnyAhead * kSkinnyStep) {
    const int64_t col = base + 8 * t;
    uint4 upper[kSkinnyAhead], lower[kSkinnyAhead];
#pragma unroll
    for (int i = 0; i < kSkinnyAhead; ++i) {
      upper[i] = load(weight.low, g, col + i * kSkinnyStep);
      lower[i] = load(weight.high, g, col + i * kSkinnyStep);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half * 8 >= x.count) break;
      uint4 row[kSkinnyAhead];
#pragma unroll
      for (int i = 0; i < kSkinnyAhead; ++i) row[i] = load(x, 8 * half + g, col + i * kSkinnyStep);
#pragma unroll
      for (int i = 0; i < kSkinnyAhead; ++i) {
        mma_m16n8k16<T>(sum[half], {upper[i].x, lower[i].x, upper[i].y, lower[i].y}, {row[i].x, row[i].y});
        mma_m16n8k16<T>(sum[half], {upper[i].z, lower[i].z, upper[i].w, lower[i].w}, {row[i].z, row[i].w});
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[g + i / 2 * 8][8 * half + 2 * t + i % 2] = sum[half][i];
  }
}

// fp32: a lane owns one row of W and 8 rows of x, and adds in order of K.
__device__ __forceinline__ void multiply_range(const SkinnyWeight<float>& weight, const MatrixRows<float>& x, int64_t begin,
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

// What the warps of a block leave for it to add.
struct SkinnySums {
  SkinnyTile of_warp[kSkinnyWarps];

  // This warp's range of K.
  template <typename T>
  __device__ __forceinline__ void multiply(const SkinnyWeight<T>& weight, const MatrixRows<T>& x, int64_t K) {
    const int64_t range = round_up(ceil_div(K, kSkinnyWarps), kSkinnyStep), begin = threadIdx.y * range;
    multiply_range(weight, x, begin, smaller(begin + range, K), of_warp[threadIdx.y]);
  }
  __device__ __forceinline__ float total(int output, int64_t row) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kSkinnyWarps; ++i) sum += of_warp[i][output][row];
    return sum;
  }
};

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

template <typename T, SkinnyOutput kOutput>
__global__ void __launch_bounds__(kWarpSize* kSkinnyWarps, kSkinnyBlocks)
    skinny_linear_kernel(SkinnyLinearParams<T> p, Activation kind, bool aligned) {
  SkinnySums& sums = shared_memory<SkinnySums>();
  constexpr bool kInner = kOutput == SkinnyOutput::kInner, kGated = kOutput == SkinnyOutput::kGated;
  constexpr int kOwn = kGated ? kSkinnyOutputs / 2 : kSkinnyOutputs;
  const int64_t all = kInner ? p.splits * p.rank : p.N, outputs = kGated ? all / 2 : all;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kOwn;
  const SkinnyWeight<T> weight(kInner ? p.lora_a : p.weight, p.K, first, first + (kGated ? outputs : kSkinnyOutputs / 2), outputs, all,
                               aligned);
  const MatrixRows<T> x{p.x, p.K, static_cast<int>(p.rows), aligned};
  sums.multiply(weight, x, p.K);
  __syncthreads();

  const int thread = threadIdx.y * kWarpSize + threadIdx.x, own = thread % kSkinnyOutputs;  // one element each
  const int64_t row = thread / kSkinnyOutputs, output = first + own;
  if (row >= p.rows || output >= outputs || own >= kOwn) return;
  const auto whole = [&](int tile_row, int64_t n) {
    float sum = sums.total(tile_row, row);
    if (p.bias != nullptr) sum += to_float(p.bias[n]);
    if (p.rank > 0) sum += low_rank(p, row, n);
    return sum;
  };
  const int64_t at = row * outputs + output;
  if constexpr (kInner) {
    p.inner[at] = sums.total(own, row);
  } else if constexpr (kOutput == SkinnyOutput::kLinear) {
    p.y[at] = round_to<T>(whole(own, output));
  } else {
    float y = activation_value(kind, rounded<T>(whole(own, output)));
    if constexpr (kGated) y *= rounded<T>(whole(own + kOwn, outputs + output));
    p.y[at] = round_to<T>(y);
  }
}

template <typename T, SkinnyOutput kOutput>
void launch_skinny(const SkinnyLinearParams<T>& p, int64_t tiles, const T* weight, Activation kind, Stream stream) {
  const LaunchShape shape{dim3(static_cast<unsigned>(tiles)), dim3(kWarpSize, kSkinnyWarps)};
  launch(skinny_linear_kernel<T, kOutput>, shape, stream, p, kind, packs_aligned(p.K, p.x, weight));
}

// What every output needs first.
template <typename T>
void skinny_inner(const SkinnyLinearParams<T>& p, Stream stream) {
  static_assert(kWarpSize * kSkinnyWarps == kSkinnyOutputs * kSkinnyRows);
  if (p.rank == 0) return;
  launch_skinny<T, SkinnyOutput::kInner>(p, ceil_div(p.splits * p.rank, kSkinnyOutputs), p.lora_a, {}, stream);
}

template <typename T>
void skinny_linear(const SkinnyLinearParams<T>& p, Stream stream) {
  if (p.rows == 0 || p.N == 0) return;
  skinny_inner(p, stream);
  launch_skinny<T, SkinnyOutput::kLinear>(p, ceil_div(p.N, kSkinnyOutputs), p.weight, {}, stream);
}

template <typename T>
void skinny_linear_activation(const SkinnyLinearParams<T>& p, Activation kind, bool gated, Stream stream) {
  if (p.rows == 0 || p.N == 0) return;
  skinny_inner(p, stream);
  const int64_t tiles = ceil_div(p.N, kSkinnyOutputs);  // of a gated one, too: 8 of N / 2 outputs each
  if (gated) {
    launch_skinny<T, SkinnyOutput::kGated>(p, tiles, p.weight, kind, stream);
  } else {
    launch_skinny<T, SkinnyOutput::kActivated>(p, tiles, p.weight, kind, stream);
  }
}

}  // namespace hybrid::cuda
