// How attention is cut into tasks: (sequence, key/value head, block of query positions).
#pragma once
#include <cstdint>

#include "attention/attention.h"

namespace hybrid {

// Query positions in a task. All query heads of a key/value head go together, so that a packed key tile serves
// positions * group rows; about 192 make the packing cheap. Results do not depend on this number.
inline int64_t query_block_positions(int64_t group) { return group >= 192 ? 1 : 192 / group; }

// Tasks of sequence i are [first_task[i], first_task[i + 1]): its blocks, each with all key/value heads.
struct AttentionPlan {
  const int64_t* first_task;  // [num_sequences + 1]
};

}  // namespace hybrid
