// The linear layer on a GPU, for the operators that are made of it.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace hybrid {

at::Tensor linear_cuda(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       const std::optional<at::Tensor>& lora_a, const std::optional<at::Tensor>& lora_b, double lora_scale,
                       at::IntArrayRef lora_splits);

}  // namespace hybrid
