#include "common/bfloat16.h"

#include <bit>

namespace hybrid {

void widen(const BFloat16* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = std::bit_cast<float>(uint32_t{from[i].bits} << 16);
}

}  // namespace hybrid
