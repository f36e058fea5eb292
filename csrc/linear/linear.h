// Linear layer straight from the training layout [out, in].
#pragma once
#include <cstdint>
#include <functional>

#include "common/bfloat16.h"

namespace hybrid {

// A weight as it is stored. A bfloat16 one is widened on its way into the sums, which is exact: the result is, bit for bit,
// that of the same weight stored as floats.
struct Weight {
  enum class Type { kFloat32, kBFloat16 };
  Weight() = default;
  Weight(const float* floats) : data(floats) {}
  Weight(const BFloat16* halves) : data(halves), type(Type::kBFloat16) {}

  // The weight from that element on.
  Weight from(int64_t element) const {
    if (type == Type::kFloat32) return static_cast<const float*>(data) + element;
    return static_cast<const BFloat16*>(data) + element;
  }

  const void* data = nullptr;
  Type type = Type::kFloat32;
};

// y[M,N] = alpha * (x[M,K] w[N,K]^T) + bias[N] + residual[M,N].
// Every output element is summed over K in one order that depends on neither M, N, the thread count nor the row's place:
// the same row of x gives the same bits whatever else is in the batch. No alignment is asked for; any size may be zero.
struct LinearArgs {
  const float* x = nullptr;  // [M, K], row stride ldx
  int64_t ldx = 0;
  Weight w{};  // [N, K], row stride ldw in elements
  int64_t ldw = 0;
  const float* bias = nullptr;      // [N] or nullptr
  const float* residual = nullptr;  // [M, N], row stride ldr, or nullptr; may be y itself (same stride)
  int64_t ldr = 0;
  float* y = nullptr;  // [M, N], row stride ldy
  int64_t ldy = 0;
  int64_t M = 0, N = 0, K = 0;
  float alpha = 1.0f;
};
void linear(const LinearArgs& args);

// linear() a tile of columns at a time, for outputs that are reduced and not kept: consume(row, rows, col, cols, y) has the finished
// y[row .. row + rows, col .. col + cols), row stride tile_cols, for as long as it runs, on any thread, in any order; every output
// comes once, and the columns of a call are those of one tile. The same bits as linear()'s.
struct LinearTilesArgs {
  const float* x = nullptr;  // [M, K], row stride ldx
  int64_t ldx = 0;
  Weight w{};  // [N, K], contiguous
  int64_t M = 0, N = 0, K = 0;
  int64_t tile_cols = 0;  // a multiple of 32
};
using ConsumeTile = std::function<void(int64_t row, int64_t rows, int64_t col, int64_t cols, const float* y)>;
void linear_tiles(const LinearTilesArgs& args, const ConsumeTile& consume);

// y[M,N] = a[M,K] b[K,N], with the same order of sums: the products of the backward.
struct MatmulArgs {
  const float* a;  // element (m, k) at a[m * a_row + k * a_col]; one of the strides is 1
  int64_t a_row, a_col;
  const float* b;  // [K, N], row stride ldb
  int64_t ldb;
  float* y;  // [M, N], row stride ldy
  int64_t ldy;
  int64_t M, N, K;
};
void matmul(const MatmulArgs& args);

// The low-rank term, added in place: y[:, split_i] += scale * (x A_i^T) B_i^T, where A stacks the splits' [R, K] blocks
// ([splits*R, K]) and B holds [N, R], its rows belonging to the split they fall in.
struct LowRankArgs {
  const float* x;
  int64_t ldx;
  const float* a;         // [num_splits * R, K]
  const float* b;         // [N, R]
  const int64_t* splits;  // [num_splits], sums to N
  int64_t num_splits;
  int64_t R;
  float scale;
  float* y;
  int64_t ldy;
  int64_t M, N, K;
  float* scratch;  // [M, num_splits * R]
};
void add_low_rank(const LowRankArgs& args);

}  // namespace hybrid
