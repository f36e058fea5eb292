// The two factors of a product on the matrix unit (matrix_unit.h), on their way into its tiles. Past their edges they are zero.
//
// Left factors are read where they lie, a group of rows at a time, and split while the unit multiplies. The right one is split
// once a thread, into a panel: [tiles of 16 columns][steps][kParts][16 words of depth][16 columns].
#pragma once
#include <string.h>

#include "linear/matrix_unit.h"
#include "linear/tile.h"

namespace hybrid::HYBRID_ISA {

// Sums run in chains of so many steps, whose totals are added in order.
inline constexpr int64_t kChainSteps = 18;  // 576 deep
inline int64_t steps_of(int64_t depth) { return larger(1, ceil_div(depth, kStep)); }

// How many threads have enough to do: each reads a left factor's part and multiplies it.
inline int64_t shares_worthwhile(int64_t rows, int64_t steps, int64_t cols) {
  constexpr int64_t kTaskWork = 1 << 20;
  return larger(1, ceil_div(rows * steps * kStep * (cols + 8), kTaskWork));
}

// One step of a group of rows, kStep elements each.
template <typename Element>
struct StepRows {
  const Element* base;
  int64_t stride;
};

// Element (row, k) at base[row * stride + k].
template <typename T>
struct RowsOf {
  using Element = T;
  const Element* base;
  int64_t stride, rows, depth;

  // Of group_rows rows from `row` on; `padded` has room for them.
  StepRows<Element> step(int64_t row, int64_t k, int64_t group_rows, Element* padded) const {
    if (row + group_rows <= rows && k + kStep <= depth) return {base + row * stride + k, stride};
    memset(padded, 0, group_rows * kStep * sizeof(Element));
    const int64_t some_rows = smaller(group_rows, rows - row), some_depth = smaller(kStep, depth - k);
    for (int64_t r = 0; r < some_rows && some_depth > 0; ++r) {
      memcpy(padded + r * kStep, base + (row + r) * stride + k, some_depth * sizeof(Element));
    }
    return {padded, kStep};
  }

  // What lies from `row` on, to be fetched little by little; nothing past the end, or where rows have gaps.
  Ahead ahead(int64_t row) const {
    if (stride != depth || row >= rows) return Ahead::nothing(base);
    return {base + row * stride, sizeof(Element)};
  }
};

// Element (row, k) at base[k * stride + row].
struct ColumnsOf {
  using Element = float;
  const float* base;
  int64_t stride, rows, depth;

  StepRows<float> step(int64_t row, int64_t k, int64_t group_rows, float* turned) const {
    for (int64_t c = 0; c < kStep; c += Vec::width) {
      for (int64_t r = 0; r < group_rows; r += Vec::width) {
        Vec square[Vec::width];
        load_transposed(base + (k + c) * stride + row + r, stride, depth - k - c, larger(0, rows - row - r), square);
#pragma GCC unroll 16
        for (int i = 0; i < Vec::width; ++i) square[i].store(turned + (r + i) * kStep + c);
      }
    }
    return {turned, kStep};
  }
  Ahead ahead(int64_t) const { return Ahead::nothing(base); }
};

inline constexpr int64_t kPanelStepWords = kParts * kTileWords;  // of one tile of columns

// What rounding leaves after two parts is the third, exactly. A NaN, of which rounding may make a zero, is left there.
inline void split_rounded(Vec value, Vec (&parts)[kParts]) {
  parts[0] = rounded(value);
  value = value - parts[0];
  parts[1] = rounded(value);
  parts[2] = value - parts[1];
}

// Right factors: pack() fills the kParts tiles of columns [col, col + 16) and depths [k, k + 32).

// From a vector of the columns for each depth: of the first half of the step, and of the second.
inline void pack_step(const Vec (&first)[kTile], const Vec (&second)[kTile], float* tiles) {
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r) {
    Vec firsts[kParts], seconds[kParts];
    split_rounded(first[r], firsts);
    split_rounded(second[r], seconds);
#pragma GCC unroll 3
    for (int i = 0; i < kParts; ++i) store_words(pack_words(firsts[i], seconds[i]), tiles + i * kTileWords + r * kTile);
  }
}

// Element (k, col) at base[col * stride + k]: a batch of activations, each a column.
struct RowsAsColumns {
  const float* base;
  int64_t stride, cols, depth;

  void pack(int64_t k, int64_t col, float* tiles) const {
    const float* const corner = base + col * stride + k;
    Vec first[kTile], second[kTile];
    load_transposed(corner, stride, cols - col, larger(0, depth - k), first);
    load_transposed(corner + kTile, stride, cols - col, larger(0, depth - k - kTile), second);
    pack_step(first, second, tiles);
  }
};

// Element (k, col) at base[k * stride + col].
struct Matrix {
  const float* base;
  int64_t stride, cols, depth;

  void pack(int64_t k, int64_t col, float* tiles) const {
    const int64_t some_cols = smaller(kTile, cols - col);
    const auto row = [&](int64_t d) { return d < depth ? Vec::load(base + d * stride + col, some_cols) : Vec(); };
    Vec first[kTile], second[kTile];
    for (int r = 0; r < kTile; ++r) {
      first[r] = row(k + r);
      second[r] = row(k + kTile + r);
    }
    pack_step(first, second, tiles);
  }
};

}  // namespace hybrid::HYBRID_ISA
