// Reads and writes every byte once, in runs as long as a part: bound by memory bandwidth.
#include "gather/unshard.h"

#include <algorithm>
#include <cstring>

namespace hybrid {

void unshard(const UnshardArgs& args) {
  int64_t before = 0;  // bytes of a rank's shard that precede this parameter's
  for (int64_t p = 0; p < args.parameters; ++p) {
    const int64_t part = args.parts[p], size = args.sizes[p];
    for (int64_t rank = 0; rank * part < size; ++rank) {
      const std::byte* from = args.shards + rank * args.shard + before;
      const int64_t count = std::min(part, size - rank * part);
      std::memcpy(args.out + args.offsets[p] + rank * part, from, static_cast<size_t>(count));
    }
    before += part;
  }
}

}  // namespace hybrid
