// Causal attention, forward.
//
// A task owns a block of query positions of one sequence, all query heads of one key/value head: rows of q. It walks the key
// tiles in order with the online softmax (Milakov and Gimelshein, 2018; FlashAttention, Dao et al., 2022): scores by the
// register tiles of linear (sums over head_dim in order), probabilities, then p v (sums over keys in order).
// Reads each key and value once a block; few rows are bound by that, many by arithmetic: 4 * head_dim flops a row and key.
//
// A row's bits are its own. Keys it may not see get probability 0 exactly, which adds nothing to sums that start from +0, and
// a tile with none of its keys is skipped; so it does not matter which other rows share the block, or where the keys end.
#include <math.h>
#include <string.h>

#include "attention/attention.h"
#include "attention/plan.h"
#include "attention/rows.h"
#include "common/math.h"
#include "common/parallel.h"
#include "common/vec.h"
#include "linear/scratch.h"
#include "linear/tile.h"

namespace hybrid::HYBRID_ISA {
namespace {

constexpr int64_t kGroupRows = kStripRows > kPanelRows ? kStripRows : kPanelRows;

class QueryBlock {
 public:
  QueryBlock(const AttentionArgs& args, const AttentionSequence& sequence, int64_t kv_head, int64_t first, int64_t positions)
      : args_(args),
        sequence_(sequence),
        kv_head_(kv_head),
        first_(first),
        group_(args.heads / args.kv_heads),
        rows_(positions * group_),
        width_(round_up(args.head_dim)) {
    const int64_t keys = kKvTile * larger(args.head_dim, Vec::width);
    const int64_t floats = rows_ * (args.head_dim + width_ + 2) + keys + kGroupRows * (kKvTile + width_ + 2) + 9 * 16;
    Carve carve{thread_scratch(ScratchSlot::kAttention, floats)};
    q_ = carve.take(rows_ * args.head_dim);
    sum_ = carve.take(rows_ * width_);
    max_ = carve.take(rows_);
    mass_ = carve.take(rows_);
    keys_ = carve.take(keys);
    scores_ = carve.take(kGroupRows * kKvTile);
    values_ = carve.take(kGroupRows * width_);
    decay_ = carve.take(kGroupRows);
    tile_mass_ = carve.take(kGroupRows);
  }

  void run() {
    gather_queries();
    const int64_t last = position(rows_ - 1);
    const int64_t oldest = args_.window > 0 ? larger(0, position(0) - args_.window + 1) : 0;
    const bool strips = rows_ <= kStripRows;
    const int64_t group_rows = strips ? rows_ : ceil_div(rows_, ceil_div(rows_, kPanelRows));
    for (int64_t tile = oldest / kKvTile; tile * kKvTile <= last; ++tile) {
      const Tile keys = locate(tile);
      if (!strips) pack_transposed(keys.k, keys.stride, keys.count, args_.head_dim, keys_, kKvTile, kKvTile);
      for (int64_t row = 0; row < rows_; row += group_rows) {
        attend(keys, row, smaller(group_rows, rows_ - row), strips);
      }
    }
    write_out();
  }

 private:
  struct Tile {
    const float* k;
    const float* v;
    int64_t stride;
    int64_t first;  // position of the first key
    int64_t count;
  };

  int64_t position(int64_t row) const { return sequence_.kv_len - sequence_.q_rows + first_ + row / group_; }
  int64_t head(int64_t row) const { return kv_head_ * group_ + row % group_; }

  Tile locate(int64_t tile) const {
    const KvTiles& kv = sequence_.kv;
    const int64_t offset = kv_head_ * kv.head_stride;
    const int64_t first = tile * kKvTile;
    return {kv.k[tile] + offset, kv.v[tile] + offset, kv.token_stride, first, smaller(kKvTile, sequence_.kv_len - first)};
  }

  void gather_queries() {
    for (int64_t row = 0; row < rows_; ++row) {
      const float* q = sequence_.q + (first_ + row / group_) * args_.q_stride + head(row) * args_.head_dim;
      memcpy(q_ + row * args_.head_dim, q, args_.head_dim * sizeof(float));
      max_[row] = -INFINITY;
      mass_[row] = 0.0f;
    }
    memset(sum_, 0, rows_ * width_ * sizeof(float));
  }

  // One register tile's rows against one key tile.
  void attend(const Tile& keys, int64_t row, int64_t rows, bool strips) {
    const int64_t visible = smaller(keys.count, position(row + rows - 1) + 1 - keys.first);
    if (visible <= 0) return;
    if (strips) {
      score_strips(keys, rows, visible);
    } else {
      score_panels(row, rows, visible);
    }
    bool any = false;
    for (int64_t r = 0; r < rows; ++r) any |= sees_[r] = softmax(keys, row + r, r, visible);
    if (!any) return;
    for_each_vec(rows, [&](int64_t r, int64_t lanes) { exp(Vec::load(decay_ + r, lanes)).store(decay_ + r, lanes); });
    for (int64_t col = 0; col < args_.head_dim; col += kPanelCols) {
      for (int64_t r = 0; r < rows; r += kPanelRows) {
        multiply_panel(smaller(kPanelRows, rows - r), smaller(kPanelCols, args_.head_dim - col),
                       {scores_ + r * kKvTile, kKvTile, 1}, keys.v + col, keys.stride, visible,
                       {values_ + r * width_ + col, width_, false});
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      if (sees_[r]) accumulate(row + r, r);
    }
  }

  void score_panels(int64_t row, int64_t rows, int64_t visible) {
    for (int64_t key = 0; key < visible; key += kPanelCols) {
      multiply_panel(rows, kPanelCols, {q_ + row * args_.head_dim, args_.head_dim, 1}, keys_ + key, kKvTile, args_.head_dim,
                     {scores_ + key, kKvTile, false});
    }
  }

  void score_strips(const Tile& keys, int64_t rows, int64_t visible) {
    for (int64_t key = 0; key < visible; key += Vec::width) {
      const float* k = keys.k + key * keys.stride;
      int64_t stride = keys.stride;
      const int64_t left = keys.count - key;
      if (left < Vec::width) {  // a padded copy, not a read past the last key
        memset(keys_, 0, Vec::width * args_.head_dim * sizeof(float));
        for (int64_t i = 0; i < left; ++i) memcpy(keys_ + i * args_.head_dim, k + i * stride, args_.head_dim * sizeof(float));
        k = keys_;
        stride = args_.head_dim;
      }
      const Prefetch next{k + Vec::width * stride, stride, left >= 2 * Vec::width ? Vec::width : 0};
      multiply_strip(rows, {q_, args_.head_dim, 1}, k, stride, args_.head_dim, next, {scores_ + key, kKvTile, false});
    }
  }

  // Scores of one row to probabilities, in place, before division by their sum; that sum to tile_mass_, the running maximum
  // updated, and the logarithm of what shrinks earlier sums to decay_. False, and zeros, where the row sees no key of this tile.
  bool softmax(const Tile& keys, int64_t row, int64_t r, int64_t visible) {
    float* scores = scores_ + r * kKvTile;
    const int64_t at = position(row) - keys.first;
    const auto [low, high] = visible_keys(at, visible, args_.window);
    const bool sees = low < high;
    const int64_t end = sees ? ceil_div(high, Vec::width) * Vec::width : 0;
    for (int64_t key = end; key < kKvTile; key += Vec::width) Vec().store(scores + key);
    decay_[r] = 0.0f;
    if (!sees) return false;
    const bool alibi = args_.alibi_slopes != nullptr;
    const float slope = alibi ? args_.alibi_slopes[head(row)] : 0.0f;
    Vec top(-INFINITY);
    for (int64_t key = 0; key < end; key += Vec::width) {
      const Vec x = scaled_scores(scores + key, args_.scale, alibi, slope, key - at);
      const Vec seen = select(in_range(key, low, high), x, Vec(-INFINITY));
      seen.store(scores + key);
      top = max(top, seen);
    }
    const float tile_max = reduce_max(top);
    const float now = max_[row] > tile_max ? max_[row] : tile_max;
    Vec mass;
    for (int64_t key = 0; key < end; key += Vec::width) {
      const Vec p = select(in_range(key, low, high), exp(Vec::load(scores + key) - now), Vec());
      p.store(scores + key);
      mass += p;
    }
    tile_mass_[r] = reduce_add(mass);
    decay_[r] = max_[row] - now;
    max_[row] = now;
    return true;
  }

  void accumulate(int64_t row, int64_t r) {
    const Vec decay(decay_[r]);
    mass_[row] = fma(Vec(mass_[row]), decay, Vec(tile_mass_[r]))[0];
    float* sum = sum_ + row * width_;
    for (int64_t c = 0; c < width_; c += Vec::width) {
      fma(Vec::load(sum + c), decay, Vec::load(values_ + r * width_ + c)).store(sum + c);
    }
  }

  void write_out() {
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t q_row = first_ + row / group_;
      float* out = sequence_.out + q_row * args_.out_stride + head(row) * args_.head_dim;
      const Vec inverse(1.0f / mass_[row]);
      for_each_vec(args_.head_dim, [&](int64_t c, int64_t lanes) {
        (Vec::load(sum_ + row * width_ + c) * inverse).store(out + c, lanes);
      });
      if (sequence_.lse != nullptr) sequence_.lse[head(row) * args_.lse_stride + q_row] = max_[row] + logf(mass_[row]);
    }
  }

  const AttentionArgs& args_;
  const AttentionSequence& sequence_;
  const int64_t kv_head_, first_, group_, rows_;
  const int64_t width_;  // head_dim in whole vectors
  float *q_, *sum_;      // [rows, head_dim], [rows, width]
  float *max_, *mass_;   // [rows]
  float* keys_;          // a key tile, transposed [head_dim, 64], or a padded strip of one
  float *scores_, *values_;       // of one register tile: [kGroupRows, 64], [kGroupRows, width]
  float *decay_, *tile_mass_;     // [kGroupRows]
  bool sees_[kGroupRows];
};

}  // namespace

void attention_forward(const AttentionArgs& args, const AttentionPlan& plan) {
  const int64_t block = query_block_positions(args.heads / args.kv_heads);
  const int64_t tasks = plan.first_task[args.num_sequences];
  parallel_for(tasks, [&](int64_t i) {
    const int64_t task = tasks - 1 - i;  // the last blocks of a sequence see the most keys: start with them
    int64_t low = 0, high = args.num_sequences;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (plan.first_task[middle] <= task ? low : high) = middle;
    }
    const AttentionSequence& sequence = args.sequences[low];
    const int64_t index = task - plan.first_task[low];
    const int64_t first = index / args.kv_heads * block;
    QueryBlock(args, sequence, index % args.kv_heads, first, smaller(block, sequence.q_rows - first)).run();
  });
}

}  // namespace hybrid::HYBRID_ISA
