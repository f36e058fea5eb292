// From the sums of a linear layer to its outputs. For *.simd.cpp and *.amx.cpp files only.
#pragma once
#include "linear/linear.h"
#include "linear/tile.h"

namespace hybrid::HYBRID_ISA {

// y[row, col .. col + lanes) from finished sums. The one place where anything is added to them.
inline void finish(const LinearArgs& args, Vec sums, int64_t row, int64_t col, int64_t lanes) {
  const Vec bias = args.bias != nullptr ? Vec::load(args.bias + col, lanes) : Vec();
  Vec out = fma(sums, Vec(args.alpha), bias);
  if (args.residual != nullptr) out += Vec::load(args.residual + row * args.ldr + col, lanes);
  out.store(args.y + row * args.ldy + col, lanes);
}

// sums [cols, rows], row stride `stride`, to y[row .. row + rows, col .. col + cols). Whole vectors of sums are read.
inline void finish_lanes(const LinearArgs& args, const float* sums, int64_t stride, int64_t row, int64_t rows, int64_t col,
                         int64_t cols) {
  for (int64_t lane = 0; lane < rows; lane += Vec::width) {
    for_each_vec(cols, [&](int64_t c, int64_t lanes) {
      Vec t[Vec::width];
      load_transposed(sums + c * stride + lane, stride, t);
      const int64_t count = smaller(Vec::width, rows - lane);
#pragma GCC unroll 16
      for (int i = 0; i < Vec::width; ++i) {
        if (i < count) finish(args, t[i], row + lane + i, col + c, lanes);
      }
    });
  }
}

}  // namespace hybrid::HYBRID_ISA
