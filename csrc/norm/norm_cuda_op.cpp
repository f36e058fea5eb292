#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#include "common/cuda_op.h"
#include "common/dims.h"
#include "norm/norm_cuda.h"

namespace hybrid {
namespace {

using at::Tensor;

struct Forward {
  Tensor y, sum, mean, rstd;  // sum is undefined without a residual
};

// Checks the operands, allocates the results and runs rms_norm or layer_norm.
Forward forward(const char* op, const Tensor& x_, const std::optional<Tensor>& residual_, const Tensor& weight_,
                const std::optional<Tensor>& bias_, double eps, bool centered) {
  const at::ScalarType dtype = x_.scalar_type();
  Dims dims(op, at::kCUDA);
  dims.expect(x_, "x", {"...", "N"}, dtype)
      .expect(residual_, "residual", {"...", "N"}, dtype)
      .expect(weight_, "weight", {"N"}, dtype)
      .expect(bias_, "bias", {"N"}, dtype);
  const OnDevice here(x_);
  const Tensor x = x_.contiguous(), weight = weight_.contiguous();
  const Tensor residual = contiguous(residual_), bias = contiguous(bias_);
  const auto statistics = x.options().dtype(at::kFloat);
  const at::IntArrayRef rows = x.sizes().slice(0, x.dim() - 1);
  const Forward out{at::empty_like(x), residual_ ? at::empty_like(x) : Tensor(), at::empty(rows, statistics),
                    at::empty(rows, statistics)};
  dispatch_float(op, x, [&](auto kind) {
    using T = decltype(kind);
    const cuda::NormParams<T> params{.x = input<T>(x),
                                     .residual = input<T>(residual),
                                     .sum = output<T>(out.sum),
                                     .weight = input<T>(weight),
                                     .bias = input<T>(bias),
                                     .y = output<T>(out.y),
                                     .mean = output<float>(out.mean),
                                     .rstd = output<float>(out.rstd),
                                     .rows = dims.leading(),
                                     .cols = dims["N"],
                                     .eps = static_cast<float>(eps)};
    centered ? cuda::layer_norm(params, here.stream) : cuda::rms_norm(params, here.stream);
  });
  return out;
}

std::tuple<Tensor, Tensor> rms_norm_cuda(const Tensor& x, const Tensor& weight, double eps) {
  const Forward f = forward("rms_norm", x, std::nullopt, weight, std::nullopt, eps, false);
  return {f.y, f.rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_cuda(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                     double eps) {
  const Forward f = forward("add_rms_norm", x, residual, weight, std::nullopt, eps, false);
  return {f.y, f.sum, f.rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_cuda(const Tensor& x, const Tensor& weight,
                                                   const std::optional<Tensor>& bias, double eps) {
  const Forward f = forward("layer_norm", x, std::nullopt, weight, bias, eps, true);
  return {f.y, f.mean, f.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_cuda(const Tensor& x, const Tensor& residual,
                                                               const Tensor& weight, const std::optional<Tensor>& bias,
                                                               double eps) {
  const Forward f = forward("add_layer_norm", x, residual, weight, bias, eps, true);
  return {f.y, f.sum, f.mean, f.rstd};
}

struct Gradients {
  Tensor x, weight, bias;  // bias is undefined for RMSNorm
};

// mean is absent for RMSNorm.
Gradients backward(const char* op, const Tensor& grad_y_, const Tensor& x_, const Tensor& weight_,
                   const std::optional<Tensor>& mean_, const Tensor& rstd_) {
  const at::ScalarType dtype = x_.scalar_type();
  Dims dims(op, at::kCUDA);
  dims.expect(x_, "x", {"...", "N"}, dtype)
      .expect(grad_y_, "grad_y", {"...", "N"}, dtype)
      .expect(weight_, "weight", {"N"}, dtype)
      .expect(mean_, "mean", {"..."})
      .expect(rstd_, "rstd", {"..."});
  const OnDevice here(x_);
  const Tensor grad_y = grad_y_.contiguous(), x = x_.contiguous(), weight = weight_.contiguous();
  const Tensor mean = contiguous(mean_), rstd = rstd_.contiguous();
  const Gradients out{at::empty_like(x), at::empty_like(weight), mean_ ? at::empty_like(weight) : Tensor()};
  const Tensor partial = at::empty({norm_backward_blocks(dims.leading()), mean_ ? 2 : 1, dims["N"]}, rstd.options());
  dispatch_float(op, x, [&](auto kind) {
    using T = decltype(kind);
    const cuda::NormBackwardParams<T> params{.grad_y = input<T>(grad_y),
                                             .x = input<T>(x),
                                             .weight = input<T>(weight),
                                             .mean = input<float>(mean),
                                             .rstd = input<float>(rstd),
                                             .grad_x = output<T>(out.x),
                                             .grad_weight = output<T>(out.weight),
                                             .grad_bias = output<T>(out.bias),
                                             .partial = output<float>(partial),
                                             .rows = dims.leading(),
                                             .cols = dims["N"]};
    mean_ ? cuda::layer_norm_backward(params, here.stream) : cuda::rms_norm_backward(params, here.stream);
  });
  return out;
}

std::tuple<Tensor, Tensor> rms_norm_backward_cuda(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                                  const Tensor& rstd) {
  const Gradients g = backward("rms_norm_backward", grad_y, x, weight, std::nullopt, rstd);
  return {g.x, g.weight};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cuda(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                                            const Tensor& mean, const Tensor& rstd) {
  const Gradients g = backward("layer_norm_backward", grad_y, x, weight, mean, rstd);
  return {g.x, g.weight, g.bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CUDA, m) {
  m.impl("rms_norm", rms_norm_cuda);
  m.impl("add_rms_norm", add_rms_norm_cuda);
  m.impl("rms_norm_backward", rms_norm_backward_cuda);
  m.impl("layer_norm", layer_norm_cuda);
  m.impl("add_layer_norm", add_layer_norm_cuda);
  m.impl("layer_norm_backward", layer_norm_backward_cuda);
}

}  // namespace hybrid
