// The register tile of a batch of some vectors' rows: y^T[cols, rows] += w * x^T, the rows of x along the vector.
//
// x is transposed once a call into panels [depth, lanes], which is little; a weight is read where it lies and broadcast, so
// that nothing of w is transposed or packed. An output element is the same chain of fma() over depth as in tile.h.
#pragma once
#include "linear/tile.h"

namespace hybrid::HYBRID_ISA {

// Weight rows of one tile, and the vectors of eight lanes that serve a batch of up to sixteen rows under AVX-512 as well: they
// waste no lanes on eight rows, and with 32 registers they need fewer loads a sum than one vector of sixteen.
inline constexpr int kTileRows = 12;
#if defined(__AVX512F__)
struct HalfVec {
  static constexpr int64_t width = 8;
  typedef float Float __attribute__((vector_size(32)));
  Float v{};
  HalfVec() = default;
  explicit HalfVec(Float value) : v(value) {}
  explicit HalfVec(float x) : v(x - Float{}) {}
  static HalfVec load(const float* p) { return HalfVec(_mm256_loadu_ps(p)); }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  friend HalfVec operator+(HalfVec a, HalfVec b) { return HalfVec(a.v + b.v); }
};
inline HalfVec fma(HalfVec a, HalfVec b, HalfVec c) { return HalfVec(_mm256_fmadd_ps(a.v, b.v, c.v)); }
inline constexpr int kWideRows = kTileRows;
inline constexpr int64_t kGroupRows = 48;
#else
using HalfVec = Vec;
inline constexpr int kWideRows = kTileRows / 2;  // 16 registers: 6 x 2 sums
inline constexpr int64_t kGroupRows = 24;
#endif

// Weight rows that share a pass over x: whole tiles, and whole vectors for the way back to [rows, cols].
static_assert(kGroupRows % kTileRows == 0 && kGroupRows % Vec::width == 0);

// Lanes that a panel of `rows` rows of x takes: two vectors, two half vectors or one.
inline constexpr int64_t kPanelLanes = 2 * Vec::width;
inline int64_t lanes_for(int64_t rows) {
  return rows > 2 * HalfVec::width ? kPanelLanes : rows > HalfVec::width ? 2 * HalfVec::width : HalfVec::width;
}

// sums[r, lane] (+)= w[r, :] . x[:, lane] for kRows weight rows and kVecs vectors of lanes; x stored [depth, lanes].
template <typename V, int kRows, int kVecs>
[[gnu::noinline]] void lane_tile(const float* w, int64_t w_stride, const float* x, int64_t depth, Ahead ahead,
                                 const Sums& sums) {
  constexpr int64_t kLanes = kVecs * V::width;
  V acc[kRows][kVecs];
  const auto add = [&](int64_t k) {
    V column[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) column[v] = V::load(x + k * kLanes + v * V::width);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V weight(w[r * w_stride + k]);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(weight, column[v], acc[r][v]);
    }
  };
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4) {
    ahead.fetch<kRows * 4>();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) add(k + i);
  }
  for (; k < depth; ++k) add(k);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      float* sum = sums.base + r * sums.stride + v * V::width;
      if (sums.resume) acc[r][v] = V::load(sum) + acc[r][v];
      acc[r][v].store(sum);
    }
  }
}

using LaneTile = void (*)(const float* w, int64_t w_stride, const float* x, int64_t depth, Ahead ahead,
                          const Sums& sums);

template <typename V, int kMaxRows, int kVecs>
LaneTile lane_tile_of(int64_t rows) {
  LaneTile tile;
  with_rows<kMaxRows>(rows, [&]<int kRows>() { tile = lane_tile<V, kRows, kVecs>; });
  return tile;
}

// lane_tile over any number of weight rows and a panel of `lanes` lanes (a value of lanes_for). Of the rows
// fetched for later, every tile fetches as many as it has itself.
inline void multiply_lanes(int64_t rows, int64_t lanes, const float* w, int64_t w_stride, const float* x, int64_t depth,
                           Ahead ahead, const Sums& sums) {
  const int64_t tile_rows = lanes == HalfVec::width ? kTileRows : kWideRows;
  for (int64_t row = 0; row < rows; row += tile_rows) {
    const int64_t count = smaller(tile_rows, rows - row);
    const auto tile = lanes == HalfVec::width ? lane_tile_of<HalfVec, kTileRows, 1>(count)
                      : lanes == kPanelLanes  ? lane_tile_of<Vec, kWideRows, 2>(count)
                                              : lane_tile_of<HalfVec, kWideRows, 2>(count);
    tile(w + row * w_stride, w_stride, x, depth, ahead.after(row * depth),
         {sums.base + row * sums.stride, sums.stride, sums.resume});
  }
}

// x[rows, depth] to panels of kPanelLanes rows, the last one lanes_for(what is left) wide: panel p begins at
// p * kPanelLanes * padded_depth(depth) and is stored [depth, lanes]. Lanes without a row are zero.
inline int64_t padded_depth(int64_t depth) { return ceil_div(depth, Vec::width) * Vec::width; }

// Columns [first, end) of one panel, `rows` of it real; first is a multiple of the vector width.
inline void pack_lanes(const float* x, int64_t stride, int64_t rows, int64_t first, int64_t end, float* panel) {
  const int64_t lanes = lanes_for(rows);
  for (int64_t k = first; k < end; k += Vec::width) {
    for (int64_t lane = 0; lane < lanes; lane += Vec::width) {
      Vec t[Vec::width];
      load_transposed(x + lane * stride + k, stride, rows - lane, end - k, t);
#pragma GCC unroll 16
      for (int i = 0; i < Vec::width; ++i) t[i].store(panel + (k + i) * lanes + lane, smaller(Vec::width, lanes - lane));
    }
  }
}

}  // namespace hybrid::HYBRID_ISA
