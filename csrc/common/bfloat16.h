#pragma once
#include <cstdint>

namespace hybrid {

// The upper half of a float, as stored in a bfloat16 tensor.
struct BFloat16 {
  uint16_t bits;
};

// to[i] = from[i], exactly.
void widen(const BFloat16* from, int64_t count, float* to);

}  // namespace hybrid
