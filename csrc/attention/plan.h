// How attention is cut into tasks. A unit is (sequence, key/value head, block of query positions), with all query heads of that
// key/value head, so that a key is read once for them. Results do not depend on how units are cut.
#pragma once
#include <cstdint>

#include "attention/attention.h"

namespace hybrid {

// Rows (positions * query heads a key/value head) up to which a unit is bound by reading keys and values: decoding.
constexpr int64_t kFewRows = 16;

// Query positions in a block. About 192 rows make packing a key tile cheap.
inline int64_t query_block_positions(int64_t group) { return group >= 192 ? 1 : 192 / group; }

// A unit whose tiles several tasks share: each leaves its tiles' results here, and the last one merges them in tile order.
struct SplitUnit {
  int64_t first_tile, tiles;
  int64_t width;    // floats of a row of sums
  float* sums;      // [tiles, rows, width] probabilities times values
  float* max;       // [tiles, rows]
  float* mass;      // [tiles, rows]
  int32_t pending;  // pieces not done yet; atomic
};

// Some key tiles of a unit: all of them, or one task's part of a split unit.
struct AttentionPiece {
  int64_t sequence, kv_head;
  int64_t first_position, positions;  // the block, counted in the sequence's query rows
  int64_t first_tile, end_tile;
  SplitUnit* split;  // nullptr where the piece is the whole unit
};

// Task i owns pieces [first_piece[i], first_piece[i + 1]).
struct AttentionPlan {
  const AttentionPiece* pieces;
  const int64_t* first_piece;
  int64_t tasks;
};

}  // namespace hybrid
