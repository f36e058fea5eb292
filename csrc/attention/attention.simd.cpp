// Causal attention, forward.
//
// A task owns some key tiles of some units (plan.h), a unit being a block of query positions of one sequence with all query heads
// of one key/value head: rows of q. Each tile of 64 keys, at absolute positions, gives every row scores (sums over head_dim in
// order, by the register tiles of linear), a softmax relative to the tile's own maximum, and p v (sums over keys in order); tiles
// are merged in order (online softmax: Milakov and Gimelshein, 2018; FlashAttention, Dao et al., 2022).
// Reads each key and value once a block. Few rows are bound by that (few_rows.h); many by arithmetic: 4 * head_dim flops a row
// and key.
//
// A row's bits are its own. Keys it may not see get probability 0 exactly, which adds nothing to sums that start from +0, and
// a tile with none of its keys is skipped; so it does not matter which other rows share the block, where the keys end, or which
// thread did which tile.
#include <string.h>

#include "attention/attention.h"
#include "attention/few_rows.h"
#include "attention/plan.h"
#include "attention/read_ahead.h"
#include "attention/rows.h"
#include "attention/softmax.h"
#include "attention/unit.h"
#include "common/parallel.h"
#include "common/vec.h"
#include "linear/scratch.h"
#include "linear/tile.h"

namespace hybrid::HYBRID_ISA {
namespace {

class ManyRows {
 public:
  ManyRows(const AttentionArgs& args, const AttentionPiece& piece)
      : unit_(args, piece), dim_(args.head_dim), width_(round_up(args.head_dim)) {
    const int64_t rows = unit_.rows();
    const int64_t floats = rows * (dim_ + width_ + 4) + kKvTile * dim_ + kPanelRows * (kKvTile + width_ + 2) + 11 * 16;
    Carve carve{thread_scratch(ScratchSlot::kAttention, floats)};
    q_ = carve.take(rows * dim_);
    sums_ = carve.take(rows * width_);
    running_ = {carve.take(rows), carve.take(rows), carve.take(rows), carve.take(rows)};
    keys_ = carve.take(kKvTile * dim_);
    scores_ = carve.take(kPanelRows * kKvTile);
    values_ = carve.take(kPanelRows * width_);
    tile_max_ = carve.take(kPanelRows);
    tile_mass_ = carve.take(kPanelRows);
  }

  void run(const AttentionPiece& piece) {
    const int64_t rows = unit_.rows(), group_rows = ceil_div(rows, ceil_div(rows, kPanelRows));
    for (int64_t r = 0; r < rows; ++r) memcpy(q_ + r * dim_, unit_.query(r), dim_ * sizeof(float));
    memset(sums_, 0, rows * width_ * sizeof(float));
    running_.start(rows);
    for (int64_t index = piece.first_tile; index < piece.end_tile; ++index) {
      const UnitRows::Tile tile = unit_.tile(index);
      pack_transposed(tile.k, tile.stride, tile.count, dim_, keys_, kKvTile, kKvTile);
      for (int64_t row = 0; row < rows; row += group_rows) attend(tile, row, smaller(group_rows, rows - row));
    }
    for (int64_t r = 0; r < rows; ++r) unit_.write(r, sums_ + r * width_, running_.max[r], running_.mass[r]);
  }

 private:
  // One register tile's rows against one key tile.
  void attend(const UnitRows::Tile& tile, int64_t row, int64_t rows) {
    const int64_t visible = smaller(tile.count, unit_.position(row + rows - 1) + 1 - tile.first);
    if (visible <= 0) return;
    for (int64_t key = 0; key < visible; key += kPanelCols) {
      multiply_panel(rows, kPanelCols, {q_ + row * dim_, dim_, 1}, keys_ + key, kKvTile, dim_, {scores_ + key, kKvTile, false});
    }
    bool any = false;
    for (int64_t r = 0; r < rows; ++r) {
      any |= unit_.softmax(row + r, tile, visible, scores_ + r * kKvTile, tile_max_ + r, tile_mass_ + r);
    }
    if (!any) return;
    for (int64_t col = 0; col < dim_; col += kPanelCols) {
      multiply_panel(rows, smaller(kPanelCols, dim_ - col), {scores_, kKvTile, 1}, tile.v + col, tile.stride, visible,
                     {values_ + col, width_, false});
    }
    running_.merge(tile_max_, tile_mass_, row, rows);
    for (int64_t r = 0; r < rows; ++r) {
      if (tile_mass_[r] != 0.0f) running_.add(row + r, sums_ + (row + r) * width_, values_ + r * width_, width_);
    }
  }

  const UnitRows unit_;
  const int64_t dim_, width_;     // head_dim, and in whole vectors
  float *q_, *sums_;              // [rows, dim], [rows, width]
  RunningSoftmax running_;
  float* keys_;                   // a key tile, transposed: [dim, 64]
  float *scores_, *values_;       // of one register tile: [kPanelRows, 64], [kPanelRows, width]
  float *tile_max_, *tile_mass_;  // [kPanelRows]
};

}  // namespace

void attention_forward(const AttentionArgs& args, const AttentionPlan& plan) {
  const int64_t group = args.heads / args.kv_heads;
  parallel_for(plan.tasks, [&](int64_t task) {
    const AttentionPiece* piece = plan.pieces + plan.first_piece[task];
    const AttentionPiece* end = plan.pieces + plan.first_piece[task + 1];
    if (piece->positions * group > kFewRows) {  // alone in its task
      ManyRows(args, *piece).run(*piece);
      return;
    }
    FewRows rows(args);
    ReadAhead ahead(args, piece, end);
    for (; piece < end; ++piece) rows.run(*piece, ahead);
  });
}

}  // namespace hybrid::HYBRID_ISA
