// The rows of a unit: where they, their keys and their outputs lie. For *.simd.cpp files only.
#pragma once
#include <math.h>

#include "attention/attention.h"
#include "attention/plan.h"
#include "attention/rows.h"
#include "attention/softmax.h"
#include "common/vec.h"

namespace hybrid::HYBRID_ISA {

class UnitRows {
 public:
  struct Tile {
    const float* k;
    const float* v;
    int64_t stride;
    int64_t first;  // position of the first key
    int64_t count;
  };

  UnitRows(const AttentionArgs& args, const AttentionPiece& piece)
      : args_(args),
        sequence_(args.sequences[piece.sequence]),
        kv_head_(piece.kv_head),
        first_(piece.first_position),
        group_(args.heads / args.kv_heads),
        rows_(piece.positions * group_) {}

  int64_t rows() const { return rows_; }
  int64_t position(int64_t row) const { return sequence_.kv_len - sequence_.q_rows + first_ + row / group_; }
  int64_t head(int64_t row) const { return kv_head_ * group_ + row % group_; }
  const float* query(int64_t row) const {
    return sequence_.q + (first_ + row / group_) * args_.q_stride + head(row) * args_.head_dim;
  }

  Tile tile(int64_t index) const {
    const KvTiles& kv = sequence_.kv;
    const int64_t offset = kv_head_ * kv.head_stride;
    const int64_t first = index * kKvTile;
    return {kv.k[index] + offset, kv.v[index] + offset, kv.token_stride, first, smaller(kKvTile, sequence_.kv_len - first)};
  }

  // softmax_tile for a row, if it sees any of the tile's first `keys` keys; else zeros, and false.
  bool softmax(int64_t row, const Tile& tile, int64_t keys, float* scores, float* tile_max, float* tile_mass) const {
    const int64_t at = position(row) - tile.first;
    const Visible see = visible_keys(at, keys, args_.window);
    if (see.low >= see.high) {
      for (int64_t key = 0; key < keys; key += Vec::width) Vec().store(scores + key);
      *tile_max = -INFINITY;
      *tile_mass = 0.0f;
      return false;
    }
    const bool alibi = args_.alibi_slopes != nullptr;
    const TileSoftmax sum =
        softmax_tile(scores, keys, at, see, {args_.scale, alibi, alibi ? args_.alibi_slopes[head(row)] : 0.0f});
    *tile_max = sum.max;
    *tile_mass = sum.mass;
    return true;
  }

  // A row's output from its finished sums.
  void write(int64_t row, const float* sum, float max, float mass) const {
    const int64_t q_row = first_ + row / group_;
    float* out = sequence_.out + q_row * args_.out_stride + head(row) * args_.head_dim;
    const Vec inverse(1.0f / mass);
    for_each_vec(args_.head_dim, [&](int64_t c, int64_t lanes) { (Vec::load(sum + c) * inverse).store(out + c, lanes); });
    if (sequence_.lse != nullptr) sequence_.lse[head(row) * args_.lse_stride + q_row] = max + logf(mass);
  }

 private:
  const AttentionArgs& args_;
  const AttentionSequence& sequence_;
  const int64_t kv_head_, first_, group_, rows_;
};

}  // namespace hybrid::HYBRID_ISA
