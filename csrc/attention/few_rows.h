// Attention of few rows: decoding. For *.simd.cpp files only.
//
// A piece is some key tiles of one unit. A key strip is transposed in registers on its way through the scores, a value row is
// loaded once for all rows; each is read once from memory, 4 bytes an element, for 4 flops a row and element: bound by reading.
// So as many rows as are used are fetched meanwhile, some way ahead (read_ahead.h).
//
// Scores are sums over head_dim in order and values sums over keys in order, as the register tiles of linear give them to many
// rows: the same bits.
#pragma once
#include <string.h>

#include "attention/attention.h"
#include "attention/plan.h"
#include "attention/read_ahead.h"
#include "attention/rows.h"
#include "attention/softmax.h"
#include "attention/unit.h"
#include "common/vec.h"
#include "linear/scratch.h"
#include "linear/tile.h"

namespace hybrid::HYBRID_ISA {

inline constexpr int kRegisterRows = 6;  // rows that go through keys and values together

// Key strips, and vectors of value columns, that a tile of so many rows takes together: their sums fit the registers, and are
// enough chains to hide the latency of fma().
constexpr int score_strips(int rows) { return kVecWidth == 16 ? 1 : rows == 1 ? 4 : rows <= 4 ? 2 : 1; }
constexpr int value_vecs(int rows) {
  if (kVecWidth == 16) return 4;
  return rows == 1 ? 8 : rows <= 3 ? 4 : 2;
}

// scores[row, key] = q[row, :] k[key, :] for kStrips strips of Vec::width keys.
template <int kRows, int kStrips>
[[gnu::noinline]] void score_tile(const float* q, const float* k, int64_t stride, int64_t dim, const Fetch& fetch,
                                  float* scores) {
  Vec acc[kStrips][kRows];
  int64_t c = 0;
  for (; c + Vec::width <= dim; c += Vec::width) {
    if (c % kLine == 0) {
      for (int64_t row = 0; row < fetch.count; ++row) fetch.line(row, c);
    }
#pragma GCC unroll 4
    for (int s = 0; s < kStrips; ++s) {
      Vec t[Vec::width];
      load_transposed(k + s * Vec::width * stride + c, stride, t);
#pragma GCC unroll 16
      for (int i = 0; i < Vec::width; ++i) {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) acc[s][r] = fma(Vec(q[r * dim + c + i]), t[i], acc[s][r]);
      }
    }
  }
  for (; c < dim; ++c) {
#pragma GCC unroll 4
    for (int s = 0; s < kStrips; ++s) {
      float column[Vec::width];
      for (int64_t i = 0; i < Vec::width; ++i) column[i] = k[(s * Vec::width + i) * stride + c];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) acc[s][r] = fma(Vec(q[r * dim + c]), Vec::load(column), acc[s][r]);
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < kStrips; ++s) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) acc[s][r].store(scores + r * kKvTile + s * Vec::width);
  }
}

// out[row] = sum over keys of p[row, key] v[key, :] for kVecs vectors of columns, the first of them first_column.
template <int kRows, int kVecs>
[[gnu::noinline]] void value_tile(const float* p, const float* v, int64_t stride, int64_t keys, const Fetch& fetch,
                                  int64_t first_column, float* out, int64_t out_stride) {
  Vec acc[kRows][kVecs];
  for (int64_t key = 0; key < keys; ++key) {
    if (key < fetch.count) {
#pragma GCC unroll 4
      for (int64_t c = 0; c < kVecs * Vec::width; c += kLine) fetch.line(key, first_column + c);
    }
    Vec column[kVecs];
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) column[i] = Vec::load(v + key * stride + i * Vec::width);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec factor(p[r * kKvTile + key]);
#pragma GCC unroll 8
      for (int i = 0; i < kVecs; ++i) acc[r][i] = fma(factor, column[i], acc[r][i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) acc[r][i].store(out + r * out_stride + i * Vec::width);
  }
}

class FewRows {
 public:
  explicit FewRows(const AttentionArgs& args) : args_(args), width_(round_up(args.head_dim)) {
    Carve carve{thread_scratch(ScratchSlot::kAttention,
                               kFewRows * (args.head_dim + kKvTile + 2 * width_ + 6) + Vec::width * args.head_dim + 11 * kLine)};
    q_ = carve.take(kFewRows * args.head_dim);
    scores_ = carve.take(kFewRows * kKvTile);
    sums_ = carve.take(kFewRows * width_);
    values_ = carve.take(kFewRows * width_);
    keys_ = carve.take(Vec::width * args.head_dim);
    tile_max_ = carve.take(kFewRows);
    tile_mass_ = carve.take(kFewRows);
    running_ = {carve.take(kFewRows), carve.take(kFewRows), carve.take(kFewRows), carve.take(kFewRows)};
  }

  void run(const AttentionPiece& piece, ReadAhead& ahead) {
    const UnitRows unit(args_, piece);
    for (int64_t r = 0; r < unit.rows(); ++r) memcpy(q_ + r * args_.head_dim, unit.query(r), args_.head_dim * sizeof(float));
    if (piece.split == nullptr) start(unit.rows());
    for (int64_t index = piece.first_tile; index < piece.end_tile; ++index) {
      if (piece.split == nullptr) {
        attend(unit, unit.tile(index), ahead, values_, width_, tile_max_, tile_mass_);
        add(unit.rows(), values_, width_, tile_max_, tile_mass_);
      } else {
        SplitUnit& split = *piece.split;
        const int64_t row = (index - split.first_tile) * unit.rows();
        attend(unit, unit.tile(index), ahead, split.sums + row * split.width, split.width, split.max + row, split.mass + row);
      }
    }
    if (piece.split == nullptr) {
      write(unit);
    } else if (__atomic_sub_fetch(&piece.split->pending, 1, __ATOMIC_ACQ_REL) == 0) {
      merge(unit, *piece.split);
    }
  }

 private:
  void start(int64_t rows) {
    running_.start(rows);
    memset(sums_, 0, rows * width_ * sizeof(float));
  }

  // One tile: its probabilities times its values, its maxima and its masses.
  void attend(const UnitRows& unit, const UnitRows::Tile& tile, ReadAhead& ahead, float* values, int64_t values_stride,
              float* tile_max, float* tile_mass) {
    const int64_t rows = unit.rows();
    const int64_t visible = smaller(tile.count, unit.position(rows - 1) + 1 - tile.first);
    const int64_t share = ceil_div(rows, ceil_div(rows, kRegisterRows));  // rows of a register tile
    for (int64_t r = 0; r < rows; r += share) {
      with_rows<kRegisterRows>(smaller(share, rows - r), [&]<int kRows>() {
        score<kRows>(q_ + r * args_.head_dim, tile, visible, r == 0 ? &ahead : nullptr, scores_ + r * kKvTile);
      });
    }
    for (int64_t r = 0; r < rows; ++r) unit.softmax(r, tile, visible, scores_ + r * kKvTile, tile_max + r, tile_mass + r);
    const Fetch fetch = ahead.next(tile.count);
    for (int64_t r = 0; r < rows; r += share) {
      with_rows<kRegisterRows>(smaller(share, rows - r), [&]<int kRows>() {
        sum_values<kRows>(scores_ + r * kKvTile, tile, visible, r == 0 ? fetch : Fetch{}, values + r * values_stride,
                          values_stride);
      });
    }
  }

  // Products of some rows with the tile's first `visible` keys. The last strip begins earlier where it would read past the tile's
  // keys, and computes some scores again.
  template <int kRows>
  void score(const float* q, const UnitRows::Tile& tile, int64_t visible, ReadAhead* ahead, float* scores) {
    constexpr int kStrips = score_strips(kRows);
    const int64_t dim = args_.head_dim;
    const auto fetch = [&](int64_t rows) { return ahead != nullptr ? ahead->next(rows) : Fetch{}; };
    if (tile.count < Vec::width) {  // a padded copy
      memset(keys_, 0, Vec::width * dim * sizeof(float));
      for (int64_t i = 0; i < tile.count; ++i) memcpy(keys_ + i * dim, tile.k + i * tile.stride, dim * sizeof(float));
      return score_tile<kRows, 1>(q, keys_, dim, dim, fetch(tile.count), scores);
    }
    int64_t key = 0;
    for (constexpr int64_t kKeys = kStrips * Vec::width; key + kKeys <= tile.count && key < visible; key += kKeys) {
      score_tile<kRows, kStrips>(q, tile.k + key * tile.stride, tile.stride, dim, fetch(kKeys), scores + key);
    }
    for (; key < visible; key += Vec::width) {
      const int64_t from = smaller(key, tile.count - Vec::width);
      score_tile<kRows, 1>(q, tile.k + from * tile.stride, tile.stride, dim, fetch(smaller(Vec::width, tile.count - key)),
                           scores + from);
    }
  }

  template <int kRows>
  void sum_values(const float* p, const UnitRows::Tile& tile, int64_t keys, const Fetch& fetch, float* out, int64_t out_stride) {
    constexpr int kVecs = value_vecs(kRows);
    int64_t col = 0;
    for (; col + kVecs * Vec::width <= args_.head_dim; col += kVecs * Vec::width) {
      value_tile<kRows, kVecs>(p, tile.v + col, tile.stride, keys, fetch, col, out + col, out_stride);
    }
    for (; col < args_.head_dim; col += kPanelCols) {
      multiply_panel(kRows, smaller(kPanelCols, args_.head_dim - col), {p, kKvTile, 1}, tile.v + col, tile.stride, keys,
                     {out + col, out_stride, false});
    }
  }

  void add(int64_t rows, const float* values, int64_t values_stride, const float* tile_max, const float* tile_mass) {
    running_.merge(tile_max, tile_mass, 0, rows);
    for (int64_t r = 0; r < rows; ++r) {
      if (tile_mass[r] != 0.0f) running_.add(r, sums_ + r * width_, values + r * values_stride, width_);
    }
  }

  void merge(const UnitRows& unit, const SplitUnit& split) {
    const int64_t rows = unit.rows();
    start(rows);
    for (int64_t tile = 0; tile < split.tiles; ++tile) {
      const int64_t row = tile * rows;
      add(rows, split.sums + row * split.width, split.width, split.max + row, split.mass + row);
    }
    write(unit);
  }

  void write(const UnitRows& unit) {
    for (int64_t r = 0; r < unit.rows(); ++r) unit.write(r, sums_ + r * width_, running_.max[r], running_.mass[r]);
  }

  const AttentionArgs& args_;
  const int64_t width_;  // head_dim in whole vectors
  float* q_;             // [kFewRows, head_dim]
  float* scores_;        // [kFewRows, 64], then probabilities
  float *sums_, *values_;  // [kFewRows, width]: over the tiles so far, and of one tile
  float* keys_;            // a padded strip
  float *tile_max_, *tile_mass_;
  RunningSoftmax running_;
};

}  // namespace hybrid::HYBRID_ISA
