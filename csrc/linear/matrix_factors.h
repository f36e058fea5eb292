// The two factors of a product on the matrix unit (matrix_unit.h), on their way into its tiles. Past their edges they are zero.
//
// Left factors are read where they lie, kGroupRows rows at a time, and split while the unit multiplies. The right one is split
// once, into a panel: [tiles of 16 columns][steps][kParts][16 words of depth][16 columns].
#pragma once
#include <string.h>

#include "linear/matrix_unit.h"
#include "linear/tile.h"

namespace hybrid::HYBRID_ISA {

inline constexpr int64_t kGroupRows = 2 * kTile;

// One step of a group: kGroupRows rows, kStep elements each.
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

  StepRows<Element> step(int64_t row, int64_t k, Element* padded) const {
    if (row + kGroupRows <= rows && k + kStep <= depth) return {base + row * stride + k, stride};
    memset(padded, 0, kGroupRows * kStep * sizeof(Element));
    const int64_t some_rows = smaller(kGroupRows, rows - row), some_depth = smaller(kStep, depth - k);
    for (int64_t r = 0; r < some_rows && some_depth > 0; ++r) {
      memcpy(padded + r * kStep, base + (row + r) * stride + k, some_depth * sizeof(Element));
    }
    return {padded, kStep};
  }

  // Fetches the group from `row` on.
  void fetch(int64_t row) const {
    if (stride != depth) return;
    const char* const lines = reinterpret_cast<const char*>(base + row * stride);
    const int64_t bytes = smaller(kGroupRows, rows - row) * stride * sizeof(Element);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(lines + at, 0, 2);
  }
  // The same, to be fetched little by little; nothing where rows have gaps.
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

  StepRows<float> step(int64_t row, int64_t k, float* turned) const {
    for (int64_t c = 0; c < kStep; c += Vec::width) {
      for (int64_t r = 0; r < kGroupRows; r += Vec::width) {
        Vec square[Vec::width];
        load_transposed(base + (k + c) * stride + row + r, stride, depth - k - c, larger(0, rows - row - r), square);
#pragma GCC unroll 16
        for (int i = 0; i < Vec::width; ++i) square[i].store(turned + (r + i) * kStep + c);
      }
    }
    return {turned, kStep};
  }
  void fetch(int64_t) const {}
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

// Element (k, col) at base[col * stride + k]: a batch of activations, each a column.
struct RowsAsColumns {
  const float* base;
  int64_t stride, cols, depth;

  void pack(int64_t k, int64_t col, float* tiles) const {
    alignas(64) float padded[kTile * kStep], parts[kParts][kTile * kTile];  // the latter pairs of bfloat16
    const float* rows = base + col * stride + k;
    int64_t row_stride = stride;
    const int64_t some_cols = smaller(kTile, cols - col), some_depth = smaller(kStep, depth - k);
    if (some_cols < kTile || some_depth < kStep) {
      memset(padded, 0, sizeof(padded));
      for (int64_t c = 0; c < some_cols && some_depth > 0; ++c) {
        memcpy(padded + c * kStep, rows + c * stride, some_depth * sizeof(float));
      }
      rows = padded;
      row_stride = kStep;
    }
    for (int64_t c = 0; c < kTile; ++c) {
      Vec firsts[kParts], seconds[kParts];
      split_rounded(Vec::load(rows + c * row_stride), firsts);
      split_rounded(Vec::load(rows + c * row_stride + 16), seconds);
#pragma GCC unroll 3
      for (int i = 0; i < kParts; ++i) store_words(pack_words(firsts[i], seconds[i]), parts[i] + c * kTile);
    }
    for (int i = 0; i < kParts; ++i) {
      Vec turned[kTile];
      load_transposed(parts[i], kTile, turned);
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r) store_words(as_words(turned[r]), tiles + i * kTileWords + r * kTile);
    }
  }
};

// Element (k, col) at base[k * stride + col].
struct Matrix {
  const float* base;
  int64_t stride, cols, depth;

  void pack(int64_t k, int64_t col, float* tiles) const {
    const int64_t some_cols = smaller(kTile, cols - col);
    const auto row = [&](int64_t d) { return d < depth ? Vec::load(base + d * stride + col, some_cols) : Vec(); };
    for (int64_t r = 0; r < kTile; ++r) {
      Vec firsts[kParts], seconds[kParts];
      split_rounded(row(k + r), firsts);
      split_rounded(row(k + r + 16), seconds);
#pragma GCC unroll 3
      for (int i = 0; i < kParts; ++i) store_words(pack_words(firsts[i], seconds[i]), tiles + i * kTileWords + r * kTile);
    }
  }
};

}  // namespace hybrid::HYBRID_ISA
