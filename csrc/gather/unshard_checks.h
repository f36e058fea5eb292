// What both devices' tensor functions check before they call unshard().
#pragma once
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include "gather/unshard.h"

namespace hybrid {

// The five lists of one length, and runs that lie within shards of `width` bytes and, one behind the other, within
// `capacity` bytes of out.
inline void check_unshard_runs(const UnshardArgs& args, c10::IntArrayRef columns, c10::IntArrayRef parts,
                               c10::IntArrayRef starts, c10::IntArrayRef sizes, c10::IntArrayRef offsets,
                               int64_t width, int64_t capacity) {
  for (const auto& list : {parts, starts, sizes, offsets}) {
    TORCH_CHECK_VALUE(list.size() == columns.size(), "unshard_: columns, parts, starts, sizes and offsets have ",
                      columns.size(), ", ", parts.size(), ", ", starts.size(), ", ", sizes.size(), " and ", offsets.size(),
                      " entries; expected one a run");
  }
  int64_t end = 0;
  for (size_t r = 0; r < columns.size(); ++r) {
    TORCH_CHECK_VALUE(columns[r] >= 0 && parts[r] >= 0 && columns[r] <= width - parts[r], "unshard_: columns[", r,
                      "] is ", columns[r], " and parts[", r, "] is ", parts[r], "; expected them to end within the ",
                      width, " columns of shards");
    TORCH_CHECK_VALUE(starts[r] >= 0 && sizes[r] >= 0 && starts[r] <= args.ranks * parts[r] - sizes[r], "unshard_: starts[",
                      r, "] is ", starts[r], " and sizes[", r, "] is ", sizes[r], "; expected them to end within ",
                      args.ranks, " (ranks) times parts[", r, "]=", parts[r]);
    TORCH_CHECK_VALUE(offsets[r] >= end, "unshard_: offsets[", r, "] is ", offsets[r], "; expected at least ", end,
                      ", the end of the run before it");
    end = offsets[r] + sizes[r];
  }
  TORCH_CHECK_VALUE(end <= capacity, "unshard_: the last run ends at ", end, "; expected at most ", capacity,
                    ", the size of out");
}

}  // namespace hybrid
