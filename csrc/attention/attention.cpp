#include "attention/attention.h"

#include <algorithm>
#include <vector>

#include "attention/plan.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "linear/scratch.h"

namespace hybrid {

HYBRID_DECLARE_SIMD(void attention_forward(const AttentionArgs& args, const AttentionPlan& plan))
HYBRID_DECLARE_SIMD(void attention_backward(const AttentionBackwardArgs& args))

namespace {

constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kTaskTiles = 16;      // worth a task: half a megabyte of keys and values where heads have 64 elements
constexpr int64_t kLargestVector = 16;  // floats: rows of split sums begin at whole vectors, and at cache lines

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Planner {
 public:
  explicit Planner(const AttentionArgs& args) : args_(args), group_(args.heads / args.kv_heads) {
    const int64_t block = query_block_positions(group_);
    for (int64_t i = args.num_sequences - 1; i >= 0; --i) {  // the last blocks see the most keys: start with them
      const int64_t rows = args.sequences[i].q_rows;
      for (int64_t first = (rows - 1) / block * block; first >= 0 && rows > 0; first -= block) {
        add_units(i, first, std::min(block, rows - first));
      }
    }
    share_reading();
  }

  AttentionPlan plan() const {
    return {pieces_.data(), first_piece_.data(), static_cast<int64_t>(first_piece_.size()) - 1};
  }

 private:
  // The block's units of all key/value heads. Many rows make a task each; few wait until it is known how much there is to read.
  void add_units(int64_t sequence, int64_t first, int64_t positions) {
    const int64_t position = args_.sequences[sequence].kv_len - args_.sequences[sequence].q_rows + first;
    const int64_t oldest = args_.window > 0 ? std::max<int64_t>(0, position - args_.window + 1) : 0;
    AttentionPiece unit{sequence, 0, first, positions, oldest / kKvTile, ceil_div(position + positions, kKvTile), nullptr};
    const bool few = positions * group_ <= kFewRows;
    for (unit.kv_head = 0; unit.kv_head < args_.kv_heads; ++unit.kv_head) {
      if (few) {
        few_.push_back(unit);
      } else {
        pieces_.push_back(unit);
        first_piece_.push_back(static_cast<int64_t>(pieces_.size()));
      }
    }
  }

  // Units of few rows into tasks of about equally many tiles; a unit with more than a fair share is split.
  void share_reading() {
    int64_t tiles = 0;
    for (const AttentionPiece& unit : few_) tiles += unit.end_tile - unit.first_tile;
    const int64_t threads = thread_count();
    const int64_t share = threads == 1 ? tiles : ceil_div(tiles, kTasksPerThread * threads);
    reserve_splits(share);
    const int64_t worthwhile = std::min(share, kTaskTiles);
    int64_t filled = 0;
    for (const AttentionPiece& unit : few_) {
      SplitUnit* split = unit.end_tile - unit.first_tile > share ? next_split(unit, share) : nullptr;
      const int64_t pieces = split != nullptr ? split->pending : 1, size = unit.end_tile - unit.first_tile;
      for (int64_t i = 0; i < pieces; ++i) {
        AttentionPiece piece = unit;
        piece.first_tile = unit.first_tile + size * i / pieces;
        piece.end_tile = unit.first_tile + size * (i + 1) / pieces;
        piece.split = split;
        pieces_.push_back(piece);
        filled += piece.end_tile - piece.first_tile;
        if (filled < worthwhile) continue;
        first_piece_.push_back(static_cast<int64_t>(pieces_.size()));
        filled = 0;
      }
    }
    if (filled > 0) first_piece_.push_back(static_cast<int64_t>(pieces_.size()));
  }

  int64_t row_floats() const { return ceil_div(args_.head_dim, kLargestVector) * kLargestVector; }

  // Room for what the pieces of split units leave to be merged.
  void reserve_splits(int64_t share) {
    int64_t units = 0, floats = 0;
    for (const AttentionPiece& unit : few_) {
      const int64_t tiles = unit.end_tile - unit.first_tile;
      if (tiles <= share) continue;
      ++units;
      floats += tiles * unit.positions * group_ * (row_floats() + 2);
    }
    splits_.reserve(units);  // so that pointers to them stay
    room_ = floats > 0 ? thread_scratch(ScratchSlot::kAttentionSplit, floats + units * 2 * kLargestVector) : nullptr;
  }

  SplitUnit* next_split(const AttentionPiece& unit, int64_t share) {
    const int64_t tiles = unit.end_tile - unit.first_tile, rows = tiles * unit.positions * group_;
    float* sums = room_;
    float* max = sums + rows * row_floats();
    room_ = max + ceil_div(2 * rows, kLargestVector) * kLargestVector;
    splits_.push_back({unit.first_tile, tiles, row_floats(), sums, max, max + rows, static_cast<int32_t>(ceil_div(tiles, share))});
    return &splits_.back();
  }

  const AttentionArgs& args_;
  const int64_t group_;
  std::vector<AttentionPiece> few_, pieces_;
  std::vector<int64_t> first_piece_{0};
  std::vector<SplitUnit> splits_;
  float* room_ = nullptr;
};

}  // namespace

void attention_forward(const AttentionArgs& args) {
  if (args.heads == 0 || args.head_dim == 0) return;
  const Planner planner(args);
  HYBRID_PICK_SIMD(attention_forward)(args, planner.plan());
}

void attention_backward(const AttentionBackwardArgs& args) {
  if (args.heads == 0 || args.head_dim == 0) return;
  HYBRID_PICK_SIMD(attention_backward)(args);
}

}  // namespace hybrid
