// Parameters made whole from what an all-gather of their flat shards leaves behind.
#pragma once
#include <cstddef>
#include <cstdint>

namespace hybrid {

struct UnshardArgs {
  // [ranks, shard]: rank after rank, and within a rank part after part, as the collective delivers them.
  const std::byte* shards;
  int64_t ranks, shard;
  // Parameter p: every rank holds parts[p] of its bytes, the last ranks fewer where they do not divide (the rest of
  // their part is padding). It has sizes[p] <= ranks * parts[p] bytes, which go to out[offsets[p]] and onwards.
  const int64_t *parts, *sizes, *offsets;
  int64_t parameters;
  std::byte* out;  // must not overlap shards
};

// Serial on purpose: it runs beside the forward pass that uses the parameters before these, and shares its cores.
void unshard(const UnshardArgs& args);

}  // namespace hybrid
