// Sums over the rows of a small fp32 array, the last step of gradients of weights and biases.
//
// A block owns 32 columns; its 8 warps add every eighth row, and the 8 sums are added in order. Reads 4 bytes an element, coalesced
// and four rows in flight a thread; bound by latency, since the array holds one row for 32 or 64 rows of the activations.
#pragma once
#include "common/launch.cuh"
#include "common/numeric.cuh"
#include "common/shared.cuh"

namespace hybrid::cuda {

constexpr int kColumnSumWarps = 8;

// out[c] = sum of x[r * stride + c] over r, rounded once.
template <typename T>
__global__ void __launch_bounds__(kWarpSize* kColumnSumWarps)
    column_sum_kernel(const float* x, int rows, int64_t stride, int cols, T* out) {
  struct Sums {
    float of_warp[kColumnSumWarps][kWarpSize];
  };
  Sums& sums = shared_memory<Sums>();
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int col = blockIdx.x * kWarpSize + lane;
  float sum = 0.0f;
  if (col < cols) {
#pragma unroll 4
    for (int row = warp; row < rows; row += kColumnSumWarps) sum += x[row * stride + col];
  }
  sums.of_warp[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && col < cols) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kColumnSumWarps; ++i) total += sums.of_warp[i][lane];
    out[col] = round_to<T>(total);
  }
}

template <typename T>
void column_sum(const float* x, int64_t rows, int64_t stride, int64_t cols, T* out, Stream stream) {
  if (cols == 0) return;
  const dim3 grid(static_cast<unsigned>(ceil_div(cols, kWarpSize)));
  launch(column_sum_kernel<T>, {grid, dim3(kWarpSize, kColumnSumWarps)}, stream, x, static_cast<int>(rows), stride,
         static_cast<int>(cols), out);
}

}  // namespace hybrid::cuda
