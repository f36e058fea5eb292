// Fetches what a task of few rows will read, at a constant distance. For *.simd.cpp files only.
//
// The hardware follows a stream of consecutive lines, but a decode task hops: keys of a tile, its values, the next block of the
// cache, the next sequence, often after a few lines. The task's own order is known, so it is fetched by that.
#pragma once
#include "attention/attention.h"
#include "attention/plan.h"
#include "attention/unit.h"

namespace hybrid::HYBRID_ISA {

inline constexpr int64_t kLine = 16;  // floats of a cache line

// Rows of keys or values to fetch, into L2: waiting for memory in L1's few miss buffers would hold up the loads at work.
struct Fetch {
  const float* const* rows = nullptr;
  int64_t count = 0;
  void line(int64_t row, int64_t column) const { __builtin_prefetch(rows[row] + column, 0, 2); }
};

class ReadAhead {
 public:
  ReadAhead(const AttentionArgs& args, const AttentionPiece* piece, const AttentionPiece* end)
      : args_(args), piece_(piece), end_(end), tile_(piece->first_tile) {
    enter();
    const int64_t distance = smaller(kMostRows, ceil_div(kDistance, args.head_dim));
    const Fetch first = next(distance);
    for (int64_t row = 0; row < first.count; ++row) {
      for (int64_t c = 0; c < args.head_dim; c += kLine) first.line(row, c);
    }
  }

  // The next rows in reading order, kMostRows at most, fewer at the end; valid until the next call.
  Fetch next(int64_t count) {
    int64_t found = 0;
    while (found < count && (left_ > 0 || advance())) {
      const int64_t taken = smaller(left_, count - found);
      const float* row = row_;
      const int64_t stride = stride_;
      for (int64_t i = 0; i < taken; ++i) rows_[found + i] = row + i * stride;
      row_ = row + taken * stride;
      left_ -= taken;
      found += taken;
    }
    return {rows_, found};
  }

 private:
  static constexpr int64_t kDistance = 4096;  // floats: some microseconds of one thread's share of the memory
  static constexpr int64_t kMostRows = kKvTile;

  void enter() {
    const UnitRows::Tile tile = UnitRows(args_, *piece_).tile(tile_);
    row_ = tile.k;
    values_ = tile.v;
    stride_ = tile.stride;
    left_ = count_ = tile.count;
  }

  // From a tile's keys to its values, and from there to the next tile's keys; false after the last.
  bool advance() {
    if (values_ != nullptr) {
      row_ = values_;
      values_ = nullptr;
      left_ = count_;
      return true;
    }
    if (piece_ == end_) return false;
    if (++tile_ == piece_->end_tile) {
      if (++piece_ == end_) return false;
      tile_ = piece_->first_tile;
    }
    enter();
    return true;
  }

  const AttentionArgs& args_;
  const AttentionPiece* piece_;
  const AttentionPiece* const end_;
  int64_t tile_;
  const float* row_ = nullptr;
  const float* values_ = nullptr;  // of the tile whose keys are being fetched
  int64_t stride_ = 0, left_ = 0, count_ = 0;
  const float* rows_[kMostRows];
};

}  // namespace hybrid::HYBRID_ISA
