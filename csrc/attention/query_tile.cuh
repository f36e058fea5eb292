// Which rows and keys a block of an attention kernel owns. Lengths are read on the device.
#pragma once
#include "attention/attention.h"
#include "common/device.cuh"

namespace hybrid::cuda {

constexpr int kTileKeys = static_cast<int>(kKvTile);

// Packed rows of a batch. Sequence b's are the last of its `kv_lengths[b]` positions, or all of them.
struct Sequences {
  const int32_t* cu_rows;     // [batch + 1] first row of each, and how many there are
  const int32_t* kv_lengths;  // [batch], or nullptr where keys are as many as rows
  int64_t batch;

  __device__ __forceinline__ int64_t length(int64_t b) const {
    return kv_lengths != nullptr ? kv_lengths[b] : cu_rows[b + 1] - cu_rows[b];
  }
};

// The last sequence b with first(b) <= index.
template <typename First>
__device__ __forceinline__ int64_t find_sequence(int64_t batch, int64_t index, const First& first) {
  int64_t low = 0, high = batch;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first(middle) <= index ? low : high) = middle;
  }
  return low;
}

// How the query heads of a key/value head go into tiles of `rows` rows.
struct HeadTiling {
  int heads, tiles, positions;  // heads in a tile; tiles that all heads need; positions in a tile
  __host__ __device__ HeadTiling(int64_t group, int rows)
      : heads(static_cast<int>(smaller(group, rows))), tiles(static_cast<int>(ceil_div(group, rows))), positions(rows / heads) {}
};

// Query rows: `heads` query heads, the fastest index, at each of some positions of one sequence.
struct QueryTile {
  int sequence, packed_row, position;  // of the first row
  int kv_head, first_head, heads, rows;

  __device__ __forceinline__ int position_of(int row) const { return position + row / heads; }
  __device__ __forceinline__ int head_of(int row) const { return first_head + row % heads; }
  __device__ __forceinline__ int64_t row_of(int row) const { return packed_row + row / heads; }  // in the batch
  __device__ __forceinline__ int newest() const { return position_of(rows - 1); }
};

// Tiles are numbered so that sequence b begins at cu_rows[b] / positions + b, which leaves room for its own whatever the lengths
// are: this many in all.
constexpr int64_t tile_slots(int64_t rows, int64_t batch, int64_t positions) { return rows / positions + batch; }

// The tile in this slot, for the heads of tile `head_tile` (counted over all key/value heads). False where the slot stays empty.
__device__ __forceinline__ bool locate_queries(const Sequences& batch, const HeadTiling& tiling, int64_t group, int64_t slot,
                                               int64_t head_tile, QueryTile& tile) {
  const auto first_slot = [&](int64_t b) { return batch.cu_rows[b] / tiling.positions + b; };
  const int64_t b = find_sequence(batch.batch, slot, first_slot);
  const int64_t skipped = (slot - first_slot(b)) * tiling.positions;
  const int64_t left = batch.cu_rows[b + 1] - batch.cu_rows[b] - skipped;
  if (left <= 0) return false;
  const int within = static_cast<int>(head_tile % tiling.tiles) * tiling.heads;  // heads of the group before this tile's
  tile.sequence = static_cast<int>(b);
  tile.packed_row = static_cast<int>(batch.cu_rows[b] + skipped);
  tile.position = static_cast<int>(batch.length(b) - left);
  tile.kv_head = static_cast<int>(head_tile / tiling.tiles);
  tile.first_head = static_cast<int>(tile.kv_head * group) + within;
  tile.heads = static_cast<int>(smaller(tiling.heads, group - within));
  tile.rows = static_cast<int>(smaller(tiling.positions, left)) * tile.heads;
  return true;
}

// First key that a query at this position sees.
__device__ __forceinline__ int64_t oldest_key(int64_t position, int64_t window) {
  return window > 0 && position >= window ? position - window + 1 : 0;
}

}  // namespace hybrid::cuda
