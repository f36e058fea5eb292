// Parameters, or the parts of them that are wanted, out of what an all-gather of their flat shards leaves behind.
#pragma once
#include <cstddef>
#include <cstdint>

namespace hybrid {

struct UnshardArgs {
  // Rank r's shard begins at r * shard: rank after rank, as a collective delivers them, or where each rank shows its own.
  // Within a shard lies part after part.
  const std::byte* shards;
  int64_t ranks, shard;
  // Run r is bytes [starts[r], starts[r] + sizes[r]) of a parameter, of which every rank holds parts[r] bytes at
  // columns[r] of its shard, the last ranks fewer where they do not divide (the rest of their part is padding). It goes
  // to out[offsets[r]] and onwards.
  const int64_t *columns, *parts, *starts, *sizes, *offsets;
  int64_t runs;
  std::byte* out;  // must not overlap shards
};

// Serial on purpose: it runs beside the forward pass that uses the parameters before these, and shares its cores.
void unshard(const UnshardArgs& args);

}  // namespace hybrid
