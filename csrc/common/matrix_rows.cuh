// A few rows of a matrix, read 16 bytes at a time, with zeros beyond its edges.
#pragma once
#include "common/vector.cuh"

namespace hybrid::cuda {

template <typename T>
struct MatrixRows {
  static constexpr int kInFlight = 8;  // loads that it takes to hide the latency of memory

  const T* rows;
  int64_t dim;   // elements of a row, and from one to the next
  int count;     // rows that may be read
  bool aligned;  // rows begin at multiples of 16 bytes

  // 16 bytes from column `col` on; zeros beyond the last column or row.
  __device__ __forceinline__ uint4 load(int row, int64_t col) const {
    return load_words(rows + row * dim + col, row < count ? dim - col : 0, aligned);
  }
  __device__ __forceinline__ float value(int row, int64_t col) const {
    return row < count && col < dim ? to_float(rows[row * dim + col]) : 0.0f;
  }
};

}  // namespace hybrid::cuda
