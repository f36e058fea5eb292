// The register tiles under linear and attention: y[rows, cols] += a[rows, depth] * b, columns along the vector.
//
// Every output element is one chain of fma() over depth, in order, starting from zero; what an earlier call left is added to
// the finished chain. Callers cut depth at the same places always, so no tile shape, batch size or path changes a bit of the
// result. Cutting long sums also keeps their error that of a blocked sum, rather than that of one chain of thousands.
//
// b is reached in one of two ways:
//   strip  b is stored [cols, depth] (a weight, a key tile) and is transposed in registers on its way through;
//          nothing is written, so this is the way for few rows, where reading b is all the work.
//   panel  b is stored [depth, cols] (a packed panel, a value tile): one load a vector; for many rows.
#pragma once
#include "common/vec.h"
#include "linear/element.h"

namespace hybrid::HYBRID_ISA {

// Rows of one register tile. AVX-512 has 32 registers: a strip holds 16 transposed columns and 16 rows, a panel tile 14 x 2
// sums, 2 columns and a broadcast. AVX2 has 16: 8 and 6; 6 x 2.
#if defined(__AVX512F__)
inline constexpr int kStripRows = 16;
inline constexpr int kPanelRows = 14;
#else
inline constexpr int kStripRows = 6;
inline constexpr int kPanelRows = 6;
#endif
// Up to so many rows two strips are multiplied side by side: the chains of one would wait for their own additions.
inline constexpr int kTwinRows = 3;
inline constexpr int kPanelVecs = 2;
inline constexpr int64_t kPanelCols = kPanelVecs * Vec::width;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if defined(__AVX512F__)
// GCC's unmasked forms warn of an uninitialised operand wherever they are inlined; with a full mask it emits the same instruction.
inline __m512 unpack_lo(__m512 a, __m512 b) { return _mm512_maskz_unpacklo_ps(0xffff, a, b); }
inline __m512 unpack_hi(__m512 a, __m512 b) { return _mm512_maskz_unpackhi_ps(0xffff, a, b); }
inline __m512d unpack_lo(__m512d a, __m512d b) { return _mm512_maskz_unpacklo_pd(0xff, a, b); }
inline __m512d unpack_hi(__m512d a, __m512d b) { return _mm512_maskz_unpackhi_pd(0xff, a, b); }
#endif

// out[k] lane r = lane k of the row at src + r * stride, for a full width x width square of lanes (element.h).
// The 128-bit pieces are put in place by the loads; what is left is a 4 x 4 transpose in every piece.
template <typename Element>
inline void load_transposed(const Element* src, int64_t stride, Vec (&out)[Vec::width]) {
#if defined(__AVX512F__)
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    __m512 row[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Element* p = src + i * stride + 4 * c * kPerLane<Element>;
      __m512 piece = _mm512_castps128_ps512(_mm_loadu_ps(as_floats(p)));
      piece = _mm512_insertf32x4(piece, _mm_loadu_ps(as_floats(p + 4 * stride)), 1);
      piece = _mm512_insertf32x4(piece, _mm_loadu_ps(as_floats(p + 8 * stride)), 2);
      row[i] = _mm512_insertf32x4(piece, _mm_loadu_ps(as_floats(p + 12 * stride)), 3);
    }
    const __m512d low01 = _mm512_castps_pd(unpack_lo(row[0], row[1]));
    const __m512d low23 = _mm512_castps_pd(unpack_lo(row[2], row[3]));
    const __m512d high01 = _mm512_castps_pd(unpack_hi(row[0], row[1]));
    const __m512d high23 = _mm512_castps_pd(unpack_hi(row[2], row[3]));
    out[4 * c].v = static_cast<Vec::Float>(_mm512_castpd_ps(unpack_lo(low01, low23)));
    out[4 * c + 1].v = static_cast<Vec::Float>(_mm512_castpd_ps(unpack_hi(low01, low23)));
    out[4 * c + 2].v = static_cast<Vec::Float>(_mm512_castpd_ps(unpack_lo(high01, high23)));
    out[4 * c + 3].v = static_cast<Vec::Float>(_mm512_castpd_ps(unpack_hi(high01, high23)));
  }
#elif defined(__AVX2__)
#pragma GCC unroll 2
  for (int c = 0; c < 2; ++c) {
    __m256 row[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Element* p = src + i * stride + 4 * c * kPerLane<Element>;
      const __m256 piece = _mm256_castps128_ps256(_mm_loadu_ps(as_floats(p)));
      row[i] = _mm256_insertf128_ps(piece, _mm_loadu_ps(as_floats(p + 4 * stride)), 1);
    }
    const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(row[0], row[1]));
    const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(row[2], row[3]));
    const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(row[0], row[1]));
    const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(row[2], row[3]));
    out[4 * c].v = static_cast<Vec::Float>(_mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23)));
    out[4 * c + 1].v = static_cast<Vec::Float>(_mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23)));
    out[4 * c + 2].v = static_cast<Vec::Float>(_mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23)));
    out[4 * c + 3].v = static_cast<Vec::Float>(_mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23)));
  }
#else
  for (int k = 0; k < Vec::width; ++k) {
    Vec::Int bits{};
    for (int r = 0; r < Vec::width; ++r) bits[r] = load_lane(src + r * stride + k * kPerLane<Element>);
    out[k] = as_float(bits);
  }
#endif
}

// The same for a corner of a square: lanes from `rows` on and columns from `cols` on are zero, and their sources are not read.
inline void load_transposed(const float* src, int64_t stride, int64_t rows, int64_t cols, Vec (&out)[Vec::width]) {
  if (rows >= Vec::width && cols >= Vec::width) return load_transposed(src, stride, out);
  float square[Vec::width * Vec::width];
  for (int64_t r = 0; r < Vec::width; ++r) {
    const Vec row = r < rows ? Vec::load(src + r * stride, smaller(cols, Vec::width)) : Vec();
    row.store(square + r * Vec::width);
  }
  load_transposed(square, Vec::width, out);
}

// out[k * out_stride + r] = src[r * stride + k] for r < rows, k < depth; zero for r in [rows, cols).
// cols is a multiple of the vector width.
inline void pack_transposed(const float* src, int64_t stride, int64_t rows, int64_t depth, float* out, int64_t cols,
                            int64_t out_stride) {
  const int64_t whole_rows = rows / Vec::width * Vec::width, whole_depth = depth / Vec::width * Vec::width;
  for (int64_t r = 0; r < whole_rows; r += Vec::width) {
    for (int64_t k = 0; k < whole_depth; k += Vec::width) {
      Vec t[Vec::width];
      load_transposed(src + r * stride + k, stride, t);
#pragma GCC unroll 16
      for (int i = 0; i < Vec::width; ++i) t[i].store(out + (k + i) * out_stride + r);
    }
  }
  for (int64_t k = whole_rows == cols ? whole_depth : 0; k < depth; ++k) {
    for (int64_t r = k < whole_depth ? whole_rows : 0; r < cols; ++r) {
      out[k * out_stride + r] = r < rows ? src[r * stride + k] : 0.0f;
    }
  }
}

// The left factor of a tile: element (row, k) at base[row * row_stride + k * depth_stride].
struct Factor {
  const float* base;
  int64_t row_stride;
  int64_t depth_stride;
  Factor from(int64_t row, int64_t k) const { return {base + row * row_stride + k * depth_stride, row_stride, depth_stride}; }
};

// Bytes of a weight that later tiles will read: fetched while this one computes, in the order in which they lie, so that the
// hardware sees a stream and runs ahead of it. Into L2: the lines come from memory, and waiting for them in L1's few miss
// buffers would hold up this tile's own loads.
struct Ahead {
  const void* at;
  int64_t element;  // bytes for every element that the tile reads

  // The same line again and again: cheaper than asking at every turn.
  static Ahead nothing(const void* cached) { return {cached, 0}; }

  // The lines for kCount elements of the tile. Inlined at once: GCC takes a function that only fetches for one without
  // effect, and drops its calls.
  template <int kCount>
  [[gnu::always_inline]] void fetch() {
    constexpr int kLines = (kCount + 15) / 16;
    const int64_t step = element * kCount / kLines;
    const char* line = static_cast<const char*>(at);
#pragma GCC unroll 32
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(line + i * step, 0, 2);
    at = line + element * kCount;
  }
  Ahead after(int64_t elements) const { return {static_cast<const char*>(at) + elements * element, element}; }
};

// Where a tile's sums go: row r at base[r * stride], whole vectors; added to what is there (resume), or replacing it.
struct Sums {
  float* base;
  int64_t stride;
  bool resume;
};

// The loops below are functions of their own, never inlined: amid other code GCC spills their sums to the stack, which halves
// the speed. The rows are unrolled by pragma for the same reason.

// sums[row] (+)= a[row, :] . b[col, :] for kStrips vectors of columns; b stored [kStrips * Vec::width, depth].
template <int kRows, int kStrips, typename Element>
[[gnu::noinline]] void strip_tile(const Factor& a, const Element* b, int64_t b_stride, int64_t depth, Ahead ahead,
                                  const Sums& sums) {
  constexpr int64_t kDepth = Vec::width * kPerLane<Element>;
  const float* x = a.base;
  const int64_t x_stride = a.row_stride;
  Vec acc[kStrips][kRows];
  const auto add = [&](int strip, int64_t k, Vec column) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) acc[strip][r] = fma(Vec(x[r * x_stride + k]), column, acc[strip][r]);
  };
  int64_t k = 0;
  for (; k + kDepth <= depth; k += kDepth) {
#pragma GCC unroll 2
    for (int s = 0; s < kStrips; ++s) {
      Vec t[Vec::width];
      load_transposed(b + s * Vec::width * b_stride + k, b_stride, t);
#pragma GCC unroll 16
      for (int i = 0; i < Vec::width; ++i) {
        ahead.fetch<Vec::width * kPerLane<Element>>();
#pragma GCC unroll 2
        for (int j = 0; j < kPerLane<Element>; ++j) {
          add(s, k + i * kPerLane<Element> + j, widened<Element>(t[i], j));
        }
      }
    }
  }
  for (; k < depth; ++k) {
#pragma GCC unroll 2
    for (int s = 0; s < kStrips; ++s) {
      float column[Vec::width];
      for (int64_t c = 0; c < Vec::width; ++c) column[c] = to_float(b[(s * Vec::width + c) * b_stride + k]);
      add(s, k, Vec::load(column));
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int s = 0; s < kStrips; ++s) {
      float* sum = sums.base + r * sums.stride + s * Vec::width;
      (sums.resume ? Vec::load(sum) + acc[s][r] : acc[s][r]).store(sum);
    }
  }
}

// sums[row] (+)= a[row, :] b[:, col] for kVecs vectors of columns; b stored [depth, cols], its last vector `lanes` wide.
template <int kRows, int kVecs, bool kUnitDepthStride, bool kWhole>
[[gnu::noinline]] void panel_tile(const Factor& a, const float* b, int64_t b_stride, int64_t depth, int64_t lanes,
                                  const Sums& sums) {
  const float* x = a.base;
  const int64_t x_row = a.row_stride;
  const int64_t x_depth = kUnitDepthStride ? 1 : a.depth_stride;
  Vec acc[kRows][kVecs];
  for (int64_t k = 0; k < depth; ++k) {
    Vec column[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      const float* p = b + k * b_stride + v * Vec::width;
      column[v] = kWhole || v + 1 < kVecs ? Vec::load(p) : Vec::load(p, lanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec factor(x[r * x_row + k * x_depth]);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(factor, column[v], acc[r][v]);
    }
  }
  if (sums.resume) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) acc[r][v] = Vec::load(sums.base + r * sums.stride + v * Vec::width) + acc[r][v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) acc[r][v].store(sums.base + r * sums.stride + v * Vec::width);
  }
}

// Calls fn.template operator()<rows>() for a row count known at run time only, 1 <= rows <= kMax.
template <int kMax, typename Fn>
inline void with_rows(int64_t rows, const Fn& fn) {
  if constexpr (kMax > 1) {
    if (rows < kMax) return with_rows<kMax - 1>(rows, fn);
  }
  fn.template operator()<kMax>();
}

// strip_tile for 1 <= rows <= kStripRows, or for two strips and 1 <= rows <= kTwinRows; a's depth_stride must be 1.
template <typename Element>
inline void multiply_strip(int64_t rows, const Factor& a, const Element* b, int64_t b_stride, int64_t depth,
                           Ahead ahead, const Sums& sums) {
  with_rows<kStripRows>(rows, [&]<int kRows>() { strip_tile<kRows, 1>(a, b, b_stride, depth, ahead, sums); });
}
template <typename Element>
inline void multiply_twin_strips(int64_t rows, const Factor& a, const Element* b, int64_t b_stride, int64_t depth,
                                 Ahead ahead, const Sums& sums) {
  with_rows<kTwinRows>(rows, [&]<int kRows>() { strip_tile<kRows, 2>(a, b, b_stride, depth, ahead, sums); });
}

// panel_tile for 1 <= rows <= kPanelRows and 1 <= cols <= kPanelCols. Columns past cols are not read where b's last vector is
// partial; the sums are written in whole vectors.
inline void multiply_panel(int64_t rows, int64_t cols, const Factor& a, const float* b, int64_t b_stride, int64_t depth,
                           const Sums& sums) {
  const bool narrow = cols <= Vec::width;
  const int64_t lanes = narrow ? cols : cols - Vec::width;
  const bool whole = lanes == Vec::width;
  with_rows<kPanelRows>(rows, [&]<int kRows>() {
    const auto tile = [&]<bool kUnit>() {
      return narrow ? (whole ? panel_tile<kRows, 1, kUnit, true> : panel_tile<kRows, 1, kUnit, false>)
                    : (whole ? panel_tile<kRows, 2, kUnit, true> : panel_tile<kRows, 2, kUnit, false>);
    };
    (a.depth_stride == 1 ? tile.template operator()<true>() : tile.template operator()<false>())(a, b, b_stride, depth,
                                                                                                lanes, sums);
  });
}

}  // namespace hybrid::HYBRID_ISA
