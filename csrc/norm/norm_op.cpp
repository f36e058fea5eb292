#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#include "common/dims.h"
#include "norm/norm.h"

namespace hybrid {
namespace {

using at::Tensor;

const float* data(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr<float>() : nullptr; }

// Checked, contiguous operands and fresh results of one forward.
struct Forward {
  Tensor x, weight;
  std::optional<Tensor> residual, bias;
  Tensor y, sum, mean, rstd;  // sum is undefined without a residual
  NormArgs args;

  Forward(const char* op, const Tensor& x_, const std::optional<Tensor>& residual_, const Tensor& weight_,
          const std::optional<Tensor>& bias_, double eps) {
    Dims dims(op);
    dims.expect(x_, "x", {"...", "N"})
        .expect(residual_, "residual", {"...", "N"})
        .expect(weight_, "weight", {"N"})
        .expect(bias_, "bias", {"N"});
    x = x_.contiguous();
    weight = weight_.contiguous();
    if (residual_) residual = residual_->contiguous();
    if (bias_) bias = bias_->contiguous();
    y = at::empty_like(x);
    if (residual) sum = at::empty_like(x);
    const at::IntArrayRef rows = x.sizes().slice(0, x.dim() - 1);
    mean = at::empty(rows, x.options());
    rstd = at::empty(rows, x.options());
    args = {.x = x.const_data_ptr<float>(),
            .residual = data(residual),
            .sum = residual ? sum.mutable_data_ptr<float>() : nullptr,
            .weight = weight.const_data_ptr<float>(),
            .bias = data(bias),
            .y = y.mutable_data_ptr<float>(),
            .mean = mean.mutable_data_ptr<float>(),
            .rstd = rstd.mutable_data_ptr<float>(),
            .rows = dims.leading(),
            .cols = dims["N"],
            .eps = static_cast<float>(eps)};
  }
};

std::tuple<Tensor, Tensor> rms_norm_cpu(const Tensor& x, const Tensor& weight, double eps) {
  const Forward f("rms_norm", x, std::nullopt, weight, std::nullopt, eps);
  rms_norm(f.args);
  return {f.y, f.rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_cpu(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                    double eps) {
  const Forward f("add_rms_norm", x, residual, weight, std::nullopt, eps);
  rms_norm(f.args);
  return {f.y, f.sum, f.rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_cpu(const Tensor& x, const Tensor& weight,
                                                  const std::optional<Tensor>& bias, double eps) {
  const Forward f("layer_norm", x, std::nullopt, weight, bias, eps);
  layer_norm(f.args);
  return {f.y, f.mean, f.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_cpu(const Tensor& x, const Tensor& residual,
                                                              const Tensor& weight, const std::optional<Tensor>& bias,
                                                              double eps) {
  const Forward f("add_layer_norm", x, residual, weight, bias, eps);
  layer_norm(f.args);
  return {f.y, f.sum, f.mean, f.rstd};
}

// The same of one backward; mean is undefined for RMSNorm.
struct Backward {
  Tensor grad_y, x, weight, mean, rstd;
  Tensor grad_x, grad_weight, grad_bias, partial;
  NormBackwardArgs args;

  Backward(const char* op, const Tensor& grad_y_, const Tensor& x_, const Tensor& weight_,
           const std::optional<Tensor>& mean_, const Tensor& rstd_) {
    Dims dims(op);
    dims.expect(x_, "x", {"...", "N"})
        .expect(grad_y_, "grad_y", {"...", "N"})
        .expect(weight_, "weight", {"N"})
        .expect(mean_, "mean", {"..."})
        .expect(rstd_, "rstd", {"..."});
    grad_y = grad_y_.contiguous();
    x = x_.contiguous();
    weight = weight_.contiguous();
    if (mean_) mean = mean_->contiguous();
    rstd = rstd_.contiguous();
    grad_x = at::empty_like(x);
    grad_weight = at::empty_like(weight);
    grad_bias = mean_ ? at::empty_like(weight) : Tensor();
    partial = at::empty({norm_backward_blocks(dims.leading()), mean_ ? 2 : 1, dims["N"]}, x.options());
    args = {.grad_y = grad_y.const_data_ptr<float>(),
            .x = x.const_data_ptr<float>(),
            .weight = weight.const_data_ptr<float>(),
            .mean = mean_ ? mean.const_data_ptr<float>() : nullptr,
            .rstd = rstd.const_data_ptr<float>(),
            .grad_x = grad_x.mutable_data_ptr<float>(),
            .grad_weight = grad_weight.mutable_data_ptr<float>(),
            .grad_bias = mean_ ? grad_bias.mutable_data_ptr<float>() : nullptr,
            .partial = partial.mutable_data_ptr<float>(),
            .rows = dims.leading(),
            .cols = dims["N"]};
  }
};

std::tuple<Tensor, Tensor> rms_norm_backward_cpu(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                                 const Tensor& rstd) {
  const Backward b("rms_norm_backward", grad_y, x, weight, std::nullopt, rstd);
  rms_norm_backward(b.args);
  return {b.grad_x, b.grad_weight};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cpu(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                                           const Tensor& mean, const Tensor& rstd) {
  const Backward b("layer_norm_backward", grad_y, x, weight, mean, rstd);
  layer_norm_backward(b.args);
  return {b.grad_x, b.grad_weight, b.grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CPU, m) {
  m.impl("rms_norm", rms_norm_cpu);
  m.impl("add_rms_norm", add_rms_norm_cpu);
  m.impl("rms_norm_backward", rms_norm_backward_cpu);
  m.impl("layer_norm", layer_norm_cpu);
  m.impl("add_layer_norm", add_layer_norm_cpu);
  m.impl("layer_norm_backward", layer_norm_backward_cpu);
}

}  // namespace hybrid
