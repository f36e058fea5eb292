// Reads and writes every byte once, in runs as long as a part: bound by memory bandwidth.
#include "gather/unshard.h"

#include <algorithm>
#include <cstring>

namespace hybrid {

void unshard(const UnshardArgs& args) {
  for (int64_t r = 0; r < args.runs; ++r) {
    const int64_t part = args.parts[r], end = args.starts[r] + args.sizes[r];
    std::byte* out = args.out + args.offsets[r];
    for (int64_t at = args.starts[r], count; at < end; at += count, out += count) {
      const int64_t rank = at / part, within = at % part;
      count = std::min(part - within, end - at);
      std::memcpy(out, args.shards + rank * args.shard + args.columns[r] + within, static_cast<size_t>(count));
    }
  }
}

}  // namespace hybrid
