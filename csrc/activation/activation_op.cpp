#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>
#include <vector>

#include "activation/activation.h"
#include "activation/activation_checks.h"
#include "common/dims.h"

namespace hybrid {
namespace {

using at::Tensor;

const float* data(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr; }

Tensor contiguous(const std::optional<Tensor>& tensor) { return tensor ? tensor->contiguous() : Tensor(); }

Tensor bias_activation_cpu(const Tensor& x, const std::optional<Tensor>& bias, std::string_view kind) {
  Dims dims("bias_activation");
  dims.expect(x, "x", {"...", "F"}).expect(bias, "bias", {"F"});
  const Activation activation = checked_kind("bias_activation", kind);
  const Tensor input = x.contiguous(), shift = contiguous(bias);
  Tensor y = at::empty_like(input);
  bias_activation(data(input), data(shift), y.mutable_data_ptr<float>(), dims.leading(), dims["F"], activation);
  return y;
}

std::tuple<Tensor, Tensor> bias_activation_backward_cpu(const Tensor& grad_y, const Tensor& x,
                                                        const std::optional<Tensor>& bias, std::string_view kind) {
  Dims dims("bias_activation_backward");
  dims.expect(x, "x", {"...", "F"}).expect(grad_y, "grad_y", {"...", "F"}).expect(bias, "bias", {"F"});
  const Activation activation = checked_kind("bias_activation_backward", kind);
  const int64_t rows = dims.leading(), cols = dims["F"];
  const Tensor grad = grad_y.contiguous(), input = x.contiguous(), shift = contiguous(bias);
  Tensor grad_x = at::empty_like(input);
  bias_activation_backward(data(grad), data(input), data(shift), grad_x.mutable_data_ptr<float>(), rows, cols,
                           activation);
  Tensor grad_bias = at::empty({bias ? cols : 0}, input.options());
  if (bias) {
    Tensor partial = at::empty({column_sum_blocks(rows), cols}, input.options());
    column_sum(data(grad_x), partial.mutable_data_ptr<float>(), grad_bias.mutable_data_ptr<float>(), rows, cols);
  }
  return {grad_x, grad_bias};
}

Tensor gated_activation_cpu(const Tensor& gate_up, std::string_view kind) {
  Dims dims("gated_activation");
  dims.expect(gate_up, "gate_up", {"...", "2F"});
  const int64_t cols = half_width("gated_activation", dims);
  const Activation activation = checked_kind("gated_activation", kind);
  const Tensor input = gate_up.contiguous();
  std::vector<int64_t> shape = input.sizes().vec();
  shape.back() = cols;
  Tensor y = at::empty(shape, input.options());
  gated_activation(data(input), y.mutable_data_ptr<float>(), dims.leading(), cols, activation);
  return y;
}

Tensor gated_activation_backward_cpu(const Tensor& grad_y, const Tensor& gate_up, std::string_view kind) {
  Dims dims("gated_activation_backward");
  dims.expect(gate_up, "gate_up", {"...", "2F"});
  const int64_t cols = half_width("gated_activation_backward", dims);
  dims.bind("F", cols, "half of gate_up").expect(grad_y, "grad_y", {"...", "F"});
  const Activation activation = checked_kind("gated_activation_backward", kind);
  const Tensor grad = grad_y.contiguous(), input = gate_up.contiguous();
  Tensor grad_gate_up = at::empty_like(input);
  gated_activation_backward(data(grad), data(input), grad_gate_up.mutable_data_ptr<float>(), dims.leading(), cols,
                            activation);
  return grad_gate_up;
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CPU, m) {
  m.impl("bias_activation", bias_activation_cpu);
  m.impl("bias_activation_backward", bias_activation_backward_cpu);
  m.impl("gated_activation", gated_activation_cpu);
  m.impl("gated_activation_backward", gated_activation_backward_cpu);
}

}  // namespace hybrid
