// One row of a low-rank product. Internal to csrc/lora.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace hybrid {

// delta[K] = scale * sum_r b[r] a[r, :]
void lora_delta_row(const float* a, const float* b, float scale, int64_t R, int64_t K, float* delta);

}  // namespace hybrid
