// The logits of every row's highest blocks, kept while the head is multiplied out: those that a truncated draw looks into.
// Internal to csrc/sampling.
//
// A cache and no more: what is not in it is computed again, to the same bits. So it does not matter which of two equal
// blocks stays, or in which order threads offer them.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>

#include "common/kernel_memory.h"
#include "sampling/row.h"

namespace hybrid {

class BlockCache {
 public:
  // Forgets everything, and makes room for `rows` rows of `blocks` blocks: all of them where that is little memory.
  void reset(int64_t rows, int64_t blocks) {
    if (std::ssize(rows_) < rows) rows_ = KernelVector<Row>(rows);
    for (Row& row : rows_) row.clear();
    blocks_ = blocks;
    capacity_ = capacity_for(rows, blocks);
    std::ranges::fill(room_for(places_, rows * blocks), kNowhere);
    kept_ = room_for(kept_memory_, rows * capacity_).data();
    logits_ = room_for(logits_memory_, rows * capacity_ * kRowBlock).data();
  }

  // What reset() makes room for.
  static int64_t bytes_for(int64_t rows, int64_t blocks) {
    const int64_t kept = rows * capacity_for(rows, blocks);
    return static_cast<int64_t>(rows * sizeof(Row) + rows * blocks * sizeof(int32_t) +
                                kept * (sizeof(Kept) + kRowBlock * sizeof(float)));
  }

  // Any thread, any row. Keeps a copy if the block is among the row's highest so far.
  void offer(int64_t row_index, int64_t block, float max, const float* logits, int64_t count) {
    Row& row = rows_[row_index];
    if (max <= row.least.load(std::memory_order_relaxed)) return;
    while (row.busy.test_and_set(std::memory_order_acquire)) continue;
    if (max > row.least.load(std::memory_order_relaxed)) {
      Kept* kept = kept_ + row_index * capacity_;
      int32_t* places = places_.data() + row_index * blocks_;
      const int64_t place = row.count < capacity_ ? row.count++ : row.lowest;
      if (place == row.lowest) places[kept[place].block] = kNowhere;
      kept[place] = {max, static_cast<int32_t>(block)};
      places[block] = static_cast<int32_t>(place);
      std::copy_n(logits, count, at(row_index, place));
      if (row.count == capacity_) {
        row.lowest = std::ranges::min_element(kept, kept + capacity_, {}, &Kept::max) - kept;
        row.least.store(kept[row.lowest].max, std::memory_order_relaxed);
      }
    }
    row.busy.clear(std::memory_order_release);
  }

  // The block's logits, or nullptr. After all offers.
  const float* find(int64_t row, int32_t block) const {
    const int32_t place = places_[row * blocks_ + block];
    return place == kNowhere ? nullptr : at(row, place);
  }

 private:
  static constexpr int64_t kEnoughBlocks = 64 * 1024;  // of all rows: 16 MiB
  static constexpr int64_t kLeastBlocks = 64;          // of a row
  static constexpr int32_t kNowhere = -1;

  struct Row {
    std::atomic_flag busy;
    std::atomic<float> least;  // the lowest maximum kept, once the row is full
    int64_t count, lowest;     // lowest: its place, then

    Row() { clear(); }
    void clear() {
      count = 0;
      lowest = kNowhere;
      least.store(-std::numeric_limits<float>::infinity(), std::memory_order_relaxed);
    }
  };
  struct Kept {
    float max;
    int32_t block;
  };

  static int64_t capacity_for(int64_t rows, int64_t blocks) {
    return std::min(blocks, std::max(kLeastBlocks, kEnoughBlocks / rows));
  }

  float* at(int64_t row, int64_t place) const { return logits_ + (row * capacity_ + place) * kRowBlock; }

  int64_t blocks_ = 0, capacity_ = 0;
  KernelVector<Row> rows_;
  KernelVector<int32_t> places_;  // [rows, blocks] where a block is kept
  Kept* kept_ = nullptr;          // [rows, capacity]
  float* logits_ = nullptr;       // [rows, capacity, kRowBlock]
  KernelVector<Kept> kept_memory_;
  KernelVector<float> logits_memory_;
};

}  // namespace hybrid
