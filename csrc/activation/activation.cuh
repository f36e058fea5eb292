// Activations and their derivatives, fused with a bias or a gate.
//
// A thread owns a pack of 16 bytes of columns in kBiasRows or kGatedRows rows, whose four or so loads are in flight together; where
// the gradient of a bias is summed it walks down kColumnSumRows rows with the sums in registers. The grid is row blocks x column tiles.
//   bias_activation           1 read + 1 write of rows cols sizeof(T)       about 15 flops an element
//   bias_activation_backward  2 reads + 1 write, 4 bytes a column and row block for the bias's partial sums
//   gated_activation          2 reads + 1 write
//   gated_activation_backward 3 reads + 2 writes
//   bound: memory (15 flops for 4 to 8 bytes; an H100 does about 20 fp32 flops a byte)
// Rows whose width is no multiple of a pack are read element by element; a single row (no bias: the whole array is one) has its
// tail read so.
#pragma once
#include "activation/activation_cuda.h"
#include "activation/functions.cuh"
#include "common/column_sum.cuh"
#include "common/vector.cuh"

namespace hybrid::cuda {

constexpr int kActivationThreads = 128;
constexpr int kBiasRows = 4, kGatedRows = 2;

// A thread's columns and rows in a grid of row blocks x column tiles, the tiles of a row block one after another.
template <typename T, int64_t kRows>
struct Patch {
  int64_t row_block, col, left, begin, end;  // left: columns from col to the end of the row

  __device__ __forceinline__ Patch(int64_t rows, int64_t cols) {
    constexpr int kWidth = kActivationThreads * kPack<T>;
    const auto tiles = static_cast<unsigned>(ceil_div(cols, kWidth));
    row_block = blockIdx.x / tiles;
    col = static_cast<int64_t>(blockIdx.x % tiles) * kWidth + threadIdx.x * kPack<T>;
    left = cols - col;
    begin = row_block * kRows;
    end = smaller(begin + kRows, rows);
  }

  // Calls fn(i, row) for the rows, i from 0: unrolled, so that arrays indexed by i stay in registers.
  template <typename Fn>
  __device__ __forceinline__ void for_each_row(const Fn& fn) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (begin + i < end) fn(i, begin + i);
    }
  }

  static LaunchShape shape(int64_t rows, int64_t cols) {
    const int64_t tiles = ceil_div(cols, kActivationThreads * kPack<T>);
    return {dim3(static_cast<unsigned>(ceil_div(rows, kRows) * tiles)), dim3(kActivationThreads)};
  }
};

template <typename T, typename Act>
__global__ void __launch_bounds__(kActivationThreads) bias_activation_kernel(BiasActivationParams<T> p, bool aligned) {
  const Patch<T, kBiasRows> patch(p.rows, p.cols);
  if (patch.left <= 0) return;
  Pack<T> bias{}, x[kBiasRows];
  if (p.bias != nullptr) bias = load_pack(p.bias + patch.col, patch.left, aligned);
  patch.for_each_row([&](int i, int64_t row) {
    x[i] = load_pack(p.x + row * p.cols + patch.col, patch.left, aligned);
  });
  patch.for_each_row([&](int i, int64_t row) {
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) x[i].value[j] = Act::value(x[i].value[j] + bias.value[j]);
    store_pack(p.y + row * p.cols + patch.col, x[i], patch.left, aligned);
  });
}

template <typename T, typename Act>
__global__ void __launch_bounds__(kActivationThreads)
    bias_activation_backward_kernel(BiasActivationBackwardParams<T> p, bool aligned) {
  const Patch<T, kColumnSumRows> patch(p.rows, p.cols);
  if (patch.left <= 0) return;
  Pack<T> bias{}, sum{};
  if (p.bias != nullptr) bias = load_pack(p.bias + patch.col, patch.left, aligned);
  for (int64_t row = patch.begin; row < patch.end; ++row) {
    const int64_t at = row * p.cols + patch.col;
    const Pack<T> x = load_pack(p.x + at, patch.left, aligned);
    Pack<T> grad = load_pack(p.grad_y + at, patch.left, aligned);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      grad.value[j] *= Act::slope(x.value[j] + bias.value[j]);
      sum.value[j] += grad.value[j];
    }
    store_pack(p.grad_x + at, grad, patch.left, aligned);
  }
  if (p.bias == nullptr) return;
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) {
    if (j < patch.left) p.partial[patch.row_block * p.cols + patch.col + j] = sum.value[j];
  }
}

template <typename T, typename Act>
__global__ void __launch_bounds__(kActivationThreads)
    gated_activation_kernel(GatedActivationParams<T> p, bool aligned) {
  const Patch<T, kGatedRows> patch(p.rows, p.cols);
  if (patch.left <= 0) return;
  Pack<T> gate[kGatedRows], up[kGatedRows];
  patch.for_each_row([&](int i, int64_t row) {
    const T* at = p.gate_up + row * 2 * p.cols + patch.col;
    gate[i] = load_pack(at, patch.left, aligned);
    up[i] = load_pack(at + p.cols, patch.left, aligned);
  });
  patch.for_each_row([&](int i, int64_t row) {
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) gate[i].value[j] = Act::value(gate[i].value[j]) * up[i].value[j];
    store_pack(p.y + row * p.cols + patch.col, gate[i], patch.left, aligned);
  });
}

template <typename T, typename Act>
__global__ void __launch_bounds__(kActivationThreads)
    gated_activation_backward_kernel(GatedActivationBackwardParams<T> p, bool aligned) {
  const Patch<T, kGatedRows> patch(p.rows, p.cols);
  if (patch.left <= 0) return;
  Pack<T> gate[kGatedRows], up[kGatedRows], grad[kGatedRows];
  patch.for_each_row([&](int i, int64_t row) {
    const T* at = p.gate_up + row * 2 * p.cols + patch.col;
    gate[i] = load_pack(at, patch.left, aligned);
    up[i] = load_pack(at + p.cols, patch.left, aligned);
    grad[i] = load_pack(p.grad_y + row * p.cols + patch.col, patch.left, aligned);
  });
  patch.for_each_row([&](int i, int64_t row) {
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      const float g = gate[i].value[j], upstream = grad[i].value[j];
      gate[i].value[j] = upstream * up[i].value[j] * Act::slope(g);
      up[i].value[j] = upstream * Act::value(g);
    }
    T* at = p.grad_gate_up + row * 2 * p.cols + patch.col;
    store_pack(at, gate[i], patch.left, aligned);
    store_pack(at + p.cols, up[i], patch.left, aligned);
  });
}

// Calls fn(the activation's type).
template <typename Fn>
void with_activation(Activation kind, const Fn& fn) {
  switch (kind) {
    case Activation::kRelu: return fn(Relu{});
    case Activation::kSilu: return fn(Silu{});
    case Activation::kGeluTanh: return fn(GeluTanh{});
    case Activation::kGeluErf: return fn(GeluErf{});
  }
}

template <typename T>
void bias_activation(const BiasActivationParams<T>& given, Activation kind, Stream stream) {
  if (given.rows == 0 || given.cols == 0) return;
  BiasActivationParams<T> p = given;
  if (p.bias == nullptr) {  // one long row: no width to be odd
    p.cols *= p.rows;
    p.rows = 1;
  }
  const int64_t stride = p.rows == 1 ? 0 : p.cols;
  const bool aligned = packs_aligned(0, p.bias) && packs_aligned(stride, p.x, p.y);
  with_activation(kind, [&](auto act) {
    launch(bias_activation_kernel<T, decltype(act)>, Patch<T, kBiasRows>::shape(p.rows, p.cols), stream, p, aligned);
  });
}

template <typename T>
void bias_activation_backward(const BiasActivationBackwardParams<T>& p, Activation kind, Stream stream) {
  if (p.rows > 0 && p.cols > 0) {
    const bool aligned = packs_aligned(0, p.bias) && packs_aligned(p.cols, p.x, p.grad_y, p.grad_x);
    with_activation(kind, [&](auto act) {
      launch(bias_activation_backward_kernel<T, decltype(act)>, Patch<T, kColumnSumRows>::shape(p.rows, p.cols), stream,
             p, aligned);
    });
  }
  if (p.bias != nullptr) column_sum(p.partial, column_sum_blocks(p.rows), p.cols, p.cols, p.grad_bias, stream);
}

template <typename T>
void gated_activation(const GatedActivationParams<T>& p, Activation kind, Stream stream) {
  if (p.rows == 0 || p.cols == 0) return;
  const bool aligned = packs_aligned(p.cols, p.gate_up, p.y);
  with_activation(kind, [&](auto act) {
    launch(gated_activation_kernel<T, decltype(act)>, Patch<T, kGatedRows>::shape(p.rows, p.cols), stream, p, aligned);
  });
}

template <typename T>
void gated_activation_backward(const GatedActivationBackwardParams<T>& p, Activation kind, Stream stream) {
  if (p.rows == 0 || p.cols == 0) return;
  const bool aligned = packs_aligned(p.cols, p.grad_y, p.gate_up, p.grad_gate_up);
  with_activation(kind, [&](auto act) {
    launch(gated_activation_backward_kernel<T, decltype(act)>, Patch<T, kGatedRows>::shape(p.rows, p.cols), stream, p,
           aligned);
  });
}

}  // namespace hybrid::cuda
