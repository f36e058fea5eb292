// What both devices' tensor functions check before they call a kernel.
#pragma once
#include <c10/util/Exception.h>

#include <stdexcept>
#include <string_view>

#include "activation/activation.h"
#include "common/dims.h"

namespace hybrid {

inline Activation checked_kind(const char* op, std::string_view name) {
  try {
    return parse_activation(name);
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, op, ": ", error.what());
  }
}

// F of gate_up [..., 2F].
inline int64_t half_width(const char* op, const Dims& dims) {
  TORCH_CHECK_VALUE(dims["2F"] % 2 == 0, op, ": gate_up has ", dims["2F"], " columns; expected an even number");
  return dims["2F"] / 2;
}

}  // namespace hybrid
