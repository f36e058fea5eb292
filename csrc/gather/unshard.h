// Parameters, or the parts of them that are wanted, out of what an all-gather of their flat shards leaves behind.
#pragma once
#include <cstddef>
#include <cstdint>

namespace hybrid {

struct UnshardArgs {
  // [ranks, shard]: rank after rank, and within a rank part after part, as the collective delivers them.
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
