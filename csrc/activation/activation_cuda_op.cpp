#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>
#include <vector>

#include "activation/activation_checks.h"
#include "activation/activation_cuda.h"
#include "common/cuda_op.h"
#include "common/dims.h"

namespace hybrid {
namespace {

using at::Tensor;

Tensor bias_activation_cuda(const Tensor& x_, const std::optional<Tensor>& bias_, std::string_view kind_) {
  Dims dims("bias_activation", at::kCUDA);
  dims.expect(x_, "x", {"...", "F"}, x_.scalar_type()).expect(bias_, "bias", {"F"}, x_.scalar_type());
  const Activation activation = checked_kind("bias_activation", kind_);
  const OnDevice here(x_);
  const Tensor x = x_.contiguous(), bias = contiguous(bias_);
  const Tensor y = at::empty_like(x);
  dispatch_float("bias_activation", x, [&](auto kind) {
    using T = decltype(kind);
    cuda::bias_activation<T>({.x = input<T>(x),
                              .bias = input<T>(bias),
                              .y = output<T>(y),
                              .rows = dims.leading(),
                              .cols = dims["F"]},
                             activation, here.stream);
  });
  return y;
}

std::tuple<Tensor, Tensor> bias_activation_backward_cuda(const Tensor& grad_y_, const Tensor& x_,
                                                         const std::optional<Tensor>& bias_, std::string_view kind_) {
  Dims dims("bias_activation_backward", at::kCUDA);
  dims.expect(x_, "x", {"...", "F"}, x_.scalar_type())
      .expect(grad_y_, "grad_y", {"...", "F"}, x_.scalar_type())
      .expect(bias_, "bias", {"F"}, x_.scalar_type());
  const Activation activation = checked_kind("bias_activation_backward", kind_);
  const OnDevice here(x_);
  const int64_t rows = dims.leading(), cols = dims["F"];
  const Tensor grad_y = grad_y_.contiguous(), x = x_.contiguous(), bias = contiguous(bias_);
  const Tensor grad_x = at::empty_like(x), grad_bias = at::empty({bias_ ? cols : 0}, x.options());
  const Tensor partial = at::empty({bias_ ? column_sum_blocks(rows) : 0, cols}, x.options().dtype(at::kFloat));
  dispatch_float("bias_activation_backward", x, [&](auto kind) {
    using T = decltype(kind);
    cuda::bias_activation_backward<T>({.grad_y = input<T>(grad_y),
                                       .x = input<T>(x),
                                       .bias = input<T>(bias),
                                       .grad_x = output<T>(grad_x),
                                       .grad_bias = output<T>(grad_bias),
                                       .partial = output<float>(partial),
                                       .rows = rows,
                                       .cols = cols},
                                      activation, here.stream);
  });
  return {grad_x, grad_bias};
}

Tensor gated_activation_cuda(const Tensor& gate_up_, std::string_view kind_) {
  Dims dims("gated_activation", at::kCUDA);
  dims.expect(gate_up_, "gate_up", {"...", "2F"}, gate_up_.scalar_type());
  const int64_t cols = half_width("gated_activation", dims);
  const Activation activation = checked_kind("gated_activation", kind_);
  const OnDevice here(gate_up_);
  const Tensor gate_up = gate_up_.contiguous();
  std::vector<int64_t> shape = gate_up.sizes().vec();
  shape.back() = cols;
  const Tensor y = at::empty(shape, gate_up.options());
  dispatch_float("gated_activation", gate_up, [&](auto kind) {
    using T = decltype(kind);
    cuda::gated_activation<T>(
        {.gate_up = input<T>(gate_up), .y = output<T>(y), .rows = dims.leading(), .cols = cols}, activation,
        here.stream);
  });
  return y;
}

Tensor gated_activation_backward_cuda(const Tensor& grad_y_, const Tensor& gate_up_, std::string_view kind_) {
  Dims dims("gated_activation_backward", at::kCUDA);
  dims.expect(gate_up_, "gate_up", {"...", "2F"}, gate_up_.scalar_type());
  const int64_t cols = half_width("gated_activation_backward", dims);
  dims.bind("F", cols, "half of gate_up").expect(grad_y_, "grad_y", {"...", "F"}, gate_up_.scalar_type());
  const Activation activation = checked_kind("gated_activation_backward", kind_);
  const OnDevice here(gate_up_);
  const Tensor grad_y = grad_y_.contiguous(), gate_up = gate_up_.contiguous();
  const Tensor grad_gate_up = at::empty_like(gate_up);
  dispatch_float("gated_activation_backward", gate_up, [&](auto kind) {
    using T = decltype(kind);
    cuda::gated_activation_backward<T>({.grad_y = input<T>(grad_y),
                                        .gate_up = input<T>(gate_up),
                                        .grad_gate_up = output<T>(grad_gate_up),
                                        .rows = dims.leading(),
                                        .cols = cols},
                                       activation, here.stream);
  });
  return grad_gate_up;
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CUDA, m) {
  m.impl("bias_activation", bias_activation_cuda);
  m.impl("bias_activation_backward", bias_activation_backward_cuda);
  m.impl("gated_activation", gated_activation_cuda);
  m.impl("gated_activation_backward", gated_activation_backward_cuda);
}

}  // namespace hybrid
