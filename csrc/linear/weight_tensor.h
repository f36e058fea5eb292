// A Weight from a tensor, for the operators.
#pragma once
#include <ATen/core/Tensor.h>

#include "linear/linear.h"

namespace hybrid {

// The type that a weight is to have: its own where the kernels read it, else float32, for the error message.
inline at::ScalarType weight_type(const at::Tensor& weight) {
  return weight.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
}

// The elements of a contiguous tensor of weight_type().
inline Weight weight_of(const at::Tensor& weight) {
  if (weight.scalar_type() == at::kBFloat16) return static_cast<const BFloat16*>(weight.const_data_ptr());
  return weight.const_data_ptr<float>();
}

}  // namespace hybrid
