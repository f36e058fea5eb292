// Sums over long arrays that do not depend on the number of threads. Internal to csrc/rlhf.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/parallel.h"

namespace hybrid {

// Calls body(begin, end, partial) for fixed chunks of [0, count), each with its own zeroed Partial, and merges the
// partials in index order with +=.
template <typename Partial, typename Body>
Partial sum_chunks(int64_t count, const Body& body) {
  constexpr int64_t kChunk = 4096;
  const int64_t chunks = (count + kChunk - 1) / kChunk;
  std::vector<Partial> partials(chunks);
  parallel_for(chunks, [&](int64_t i) { body(i * kChunk, std::min(count, (i + 1) * kChunk), partials[i]); });
  Partial total{};
  for (const Partial& partial : partials) total += partial;
  return total;
}

}  // namespace hybrid
