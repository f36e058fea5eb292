// What both devices' tensor functions check before they call unshard().
#pragma once
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include "gather/unshard.h"

namespace hybrid {

inline void check_unshard_lists(const UnshardArgs& args, c10::IntArrayRef parts, c10::IntArrayRef sizes,
                                c10::IntArrayRef offsets, int64_t capacity) {
  TORCH_CHECK_VALUE(parts.size() == sizes.size() && parts.size() == offsets.size(), "unshard_: parts, sizes and offsets have ",
                    parts.size(), ", ", sizes.size(), " and ", offsets.size(), " entries; expected one a parameter");
  int64_t held = 0, end = 0;
  for (size_t p = 0; p < parts.size(); ++p) {
    TORCH_CHECK_VALUE(parts[p] >= 0 && sizes[p] >= 0 && sizes[p] <= args.ranks * parts[p], "unshard_: sizes[", p, "] is ",
                      sizes[p], "; expected 0 to ", args.ranks, " (ranks) times parts[", p, "]=", parts[p]);
    TORCH_CHECK_VALUE(offsets[p] >= end, "unshard_: offsets[", p, "] is ", offsets[p],
                      "; expected at least ", end, ", the end of the parameter before it");
    held += parts[p];
    end = offsets[p] + sizes[p];
  }
  TORCH_CHECK_VALUE(held == args.shard, "unshard_: parts sum to ", held, "; expected the ", args.shard,
                    " columns of shards");
  TORCH_CHECK_VALUE(end <= capacity, "unshard_: the last parameter ends at ", end, "; expected at most ", capacity,
                    ", the size of out");
}

}  // namespace hybrid
