// The 16-bit floating formats as bits. They compute nothing: kernels convert to float (common/numeric.cuh).
#pragma once
#include <cstdint>

namespace hybrid {

struct f16 {  // IEEE binary16: 5 bits of exponent, 10 of fraction
  uint16_t bits;
};
struct bf16 {  // the upper half of a float
  uint16_t bits;
};

}  // namespace hybrid
