// RMSNorm and LayerNorm, forward and backward.
//
// Forward. A block owns a row; a thread owns every blockDim.x-th pack of 16 bytes and keeps up to 16 elements in registers,
// loads first. The row is read once; only rows beyond 512 threads x 16 = 8192 elements are read again, from L2.
//   bytes: (1 read + 1 write) rows cols sizeof(T), with a residual (2 + 2); flops: about 5 (RMS) or 8 (Layer) an element
//   bound: memory, at any number of rows that fills the device; a few rows (decode) are bound by launch and latency, about 3 us
//
// Backward. A block owns kNormBackwardRows rows and all their columns, so that sums over rows stay with one thread: the gradients of
// weight and bias are added up in shared memory (in the partial array itself for rows too long for that), a row after another. Each
// row is read twice, the second time from L1. column_sum_kernel then adds the blocks.
//   bytes: (2 reads + 1 write) rows cols sizeof(T), and 8 (Layer: 16) cols a block for the partial sums; bound: memory
#pragma once
#include "common/column_sum.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "norm/norm_cuda.h"

namespace hybrid::cuda {

constexpr int kNormThreads = 512;  // at most; fewer for short rows
template <typename T>
inline constexpr int kRowPacks = 16 / kPack<T>;  // 16 elements: with more, 512 threads would run out of registers
constexpr int64_t kNormSharedBytes = 48 << 10;

// A thread's packs in one tile of a row: calls fn(i, column, elements there) for those that begin inside the row.
template <typename T, typename Fn>
__device__ __forceinline__ void for_each_pack(int64_t tile, int64_t cols, const Fn& fn) {
#pragma unroll
  for (int i = 0; i < kRowPacks<T>; ++i) {
    const int64_t col = tile + static_cast<int64_t>(i * blockDim.x + threadIdx.x) * kPack<T>;
    if (col < cols) fn(i, col, cols - col);
  }
}

template <typename T>
__device__ __forceinline__ int64_t tile_width() {
  return static_cast<int64_t>(blockDim.x) * kRowPacks<T> * kPack<T>;
}

// x + residual of a tile, rounded as `sum` stores it; x itself without a residual.
template <typename T>
__device__ __forceinline__ void load_sum(const NormParams<T>& p, int64_t row, int64_t tile, bool aligned,
                                         Pack<T> (&packs)[kRowPacks<T>]) {
  const int64_t base = row * p.cols;
  for_each_pack<T>(tile, p.cols, [&](int i, int64_t col, int64_t count) {
    packs[i] = load_pack(p.x + base + col, count, aligned);
  });
  if (p.residual == nullptr) return;
  for_each_pack<T>(tile, p.cols, [&](int i, int64_t col, int64_t count) {
    const Pack<T> residual = load_pack(p.residual + base + col, count, aligned);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) packs[i].value[j] = rounded<T>(packs[i].value[j] + residual.value[j]);
    store_pack(p.sum + base + col, packs[i], count, aligned);
  });
}

template <typename T, bool kCentered>
__global__ void __launch_bounds__(kNormThreads) norm_kernel(NormParams<T> p, bool aligned) {
  BlockReducer<float> reduce;
  const int64_t row = blockIdx.x;
  const T* stored = (p.residual != nullptr ? p.sum : p.x) + row * p.cols;
  const bool one_tile = p.cols <= tile_width<T>();
  const float count = static_cast<float>(p.cols);
  Pack<T> packs[kRowPacks<T>];

  // A tile of a long row comes back from where it was stored, by the same thread.
  const auto reload = [&](int64_t tile) {
    if (one_tile) return;
    for_each_pack<T>(tile, p.cols,
                     [&](int i, int64_t col, int64_t left) { packs[i] = load_pack(stored + col, left, aligned); });
  };
  const auto squares_about = [&](int64_t tile, float center) {
    float sum = 0.0f;
    for_each_pack<T>(tile, p.cols, [&](int i, int64_t, int64_t left) {
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) {
        const float deviation = packs[i].value[j] - center;
        if (j < left) sum = fmaf(deviation, deviation, sum);
      }
    });
    return sum;
  };

  float first = 0.0f;  // the sum for LayerNorm, the sum of squares for RMSNorm
  for (int64_t tile = 0; tile < p.cols; tile += tile_width<T>()) {
    load_sum(p, row, tile, aligned, packs);
    if constexpr (kCentered) {
      for_each_pack<T>(tile, p.cols, [&](int i, int64_t, int64_t) {
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j) first += packs[i].value[j];
      });
    } else {
      first += squares_about(tile, 0.0f);
    }
  }
  first = reduce(first);

  const float mean = kCentered ? first / count : 0.0f;
  float squares = first;
  if constexpr (kCentered) {  // once the mean is known: E[x^2] - E[x]^2 would cancel for rows with a large mean
    squares = 0.0f;
    for (int64_t tile = 0; tile < p.cols; tile += tile_width<T>()) {
      reload(tile);
      squares += squares_about(tile, mean);
    }
    squares = reduce(squares);
  }
  const float rstd = 1.0f / sqrtf(squares / count + p.eps);

  for (int64_t tile = 0; tile < p.cols; tile += tile_width<T>()) {
    reload(tile);
    for_each_pack<T>(tile, p.cols, [&](int i, int64_t col, int64_t left) {
      const Pack<T> weight = load_pack(p.weight + col, left, aligned);
      Pack<T> bias{};
      if (p.bias != nullptr) bias = load_pack(p.bias + col, left, aligned);
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) {
        packs[i].value[j] = ((packs[i].value[j] - mean) * rstd) * weight.value[j] + bias.value[j];
      }
      store_pack(p.y + row * p.cols + col, packs[i], left, aligned);
    });
  }
  if (threadIdx.x == 0) {
    if (kCentered && p.mean != nullptr) p.mean[row] = mean;
    if (p.rstd != nullptr) p.rstd[row] = rstd;
  }
}

// With n = (x - mean) rstd and g = grad_y weight:  grad_x = rstd (g - mean(g) - n mean(g n)); RMSNorm has neither mean nor mean(g).
// weight_sum and bias_sum [cols] belong to the block; a thread touches its own columns only.
template <typename T, bool kCentered>
__device__ __forceinline__ void norm_backward_row(const NormBackwardParams<T>& p, int64_t row, bool aligned,
                                                  float* weight_sum, float* bias_sum, BlockReducer<float>& reduce) {
  const T* grad_y = p.grad_y + row * p.cols;
  const T* x = p.x + row * p.cols;
  const float count = static_cast<float>(p.cols);
  const float rstd = p.rstd[row];
  const float mean = kCentered ? p.mean[row] : 0.0f;
  const int64_t stride = static_cast<int64_t>(blockDim.x) * kPack<T>;

  float slope = 0.0f, shift = 0.0f;
  for (int64_t col = threadIdx.x * kPack<T>; col < p.cols; col += stride) {
    const Pack<T> grad = load_pack(grad_y + col, p.cols - col, aligned);
    const Pack<T> value = load_pack(x + col, p.cols - col, aligned);
    const Pack<T> weight = load_pack(p.weight + col, p.cols - col, aligned);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {  // elements beyond the row have weight 0
      const float weighted = grad.value[j] * weight.value[j];
      slope = fmaf(weighted, (value.value[j] - mean) * rstd, slope);
      shift += weighted;
    }
  }
  slope = reduce(slope) / count;
  shift = kCentered ? reduce(shift) / count : 0.0f;

  for (int64_t col = threadIdx.x * kPack<T>; col < p.cols; col += stride) {
    const int64_t left = p.cols - col;
    const Pack<T> grad = load_pack(grad_y + col, left, aligned);
    const Pack<T> value = load_pack(x + col, left, aligned);
    const Pack<T> weight = load_pack(p.weight + col, left, aligned);
    Pack<T> grad_x;
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      const float normalised = (value.value[j] - mean) * rstd;
      grad_x.value[j] = (fmaf(-normalised, slope, grad.value[j] * weight.value[j]) - shift) * rstd;
      if (j < left) {
        weight_sum[col + j] = fmaf(grad.value[j], normalised, weight_sum[col + j]);
        if (kCentered) bias_sum[col + j] += grad.value[j];
      }
    }
    store_pack(p.grad_x + row * p.cols + col, grad_x, left, aligned);
  }
}

// Calls fn(column) for the columns that the thread owns in norm_backward_row.
template <typename T, typename Fn>
__device__ __forceinline__ void for_each_own_column(int64_t cols, const Fn& fn) {
  for (int64_t col = threadIdx.x * kPack<T>; col < cols; col += static_cast<int64_t>(blockDim.x) * kPack<T>) {
    const int64_t end = smaller(col + kPack<T>, cols);
    for (int64_t j = col; j < end; ++j) fn(j);
  }
}

template <typename T, bool kCentered>
__global__ void __launch_bounds__(kNormThreads)
    norm_backward_kernel(NormBackwardParams<T> p, bool aligned, bool sums_in_shared) {
  constexpr int kSums = kCentered ? 2 : 1;
  BlockReducer<float> reduce;
  float* partial = p.partial + blockIdx.x * kSums * p.cols;
  float* weight_sum = sums_in_shared ? dynamic_shared_memory<float>() : partial;
  float* bias_sum = weight_sum + p.cols;
  for_each_own_column<T>(p.cols, [&](int64_t col) {
    weight_sum[col] = 0.0f;
    if (kCentered) bias_sum[col] = 0.0f;
  });
  const int64_t begin = blockIdx.x * kNormBackwardRows;
  const int64_t end = smaller(begin + kNormBackwardRows, p.rows);
  for (int64_t row = begin; row < end; ++row) {
    norm_backward_row<T, kCentered>(p, row, aligned, weight_sum, bias_sum, reduce);
  }
  if (!sums_in_shared) return;
  for_each_own_column<T>(p.cols, [&](int64_t col) {
    partial[col] = weight_sum[col];
    if (kCentered) partial[p.cols + col] = bias_sum[col];
  });
}

// Threads for a row: one a pack, in whole warps. It depends on the row's width alone, hence so does the order of its sums.
template <typename T>
unsigned norm_threads(int64_t cols) {
  return static_cast<unsigned>(smaller(round_up(ceil_div(cols, kPack<T>), kWarpSize), kNormThreads));
}

template <bool kCentered, typename T>
void launch_norm(const NormParams<T>& p, Stream stream) {
  if (p.rows == 0 || p.cols == 0) return;
  const bool aligned = packs_aligned(0, p.weight, p.bias) && packs_aligned(p.cols, p.x, p.residual, p.sum, p.y);
  launch(norm_kernel<T, kCentered>, {dim3(static_cast<unsigned>(p.rows)), dim3(norm_threads<T>(p.cols))}, stream, p,
         aligned);
}

template <bool kCentered, typename T>
void launch_norm_backward(const NormBackwardParams<T>& p, Stream stream) {
  constexpr int kSums = kCentered ? 2 : 1;
  const int64_t blocks = norm_backward_blocks(p.rows);
  if (blocks > 0 && p.cols > 0) {
    const bool aligned = packs_aligned(0, p.weight) && packs_aligned(p.cols, p.grad_y, p.x, p.grad_x);
    const int64_t sum_bytes = kSums * p.cols * static_cast<int64_t>(sizeof(float));
    const bool in_shared = sum_bytes <= kNormSharedBytes - 1024;  // the reducer's buffers want some of it
    launch(norm_backward_kernel<T, kCentered>,
           {dim3(static_cast<unsigned>(blocks)), dim3(norm_threads<T>(p.cols)),
            static_cast<size_t>(in_shared ? sum_bytes : 0)},
           stream, p, aligned, in_shared);
  }
  column_sum(p.partial, blocks, kSums * p.cols, p.cols, p.grad_weight, stream);
  if (kCentered) column_sum(p.partial + p.cols, blocks, kSums * p.cols, p.cols, p.grad_bias, stream);
}

template <typename T>
void rms_norm(const NormParams<T>& p, Stream stream) {
  launch_norm<false>(p, stream);
}
template <typename T>
void layer_norm(const NormParams<T>& p, Stream stream) {
  launch_norm<true>(p, stream);
}
template <typename T>
void rms_norm_backward(const NormBackwardParams<T>& p, Stream stream) {
  launch_norm_backward<false>(p, stream);
}
template <typename T>
void layer_norm_backward(const NormBackwardParams<T>& p, Stream stream) {
  launch_norm_backward<true>(p, stream);
}

}  // namespace hybrid::cuda
