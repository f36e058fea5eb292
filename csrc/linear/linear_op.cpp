#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include <string_view>
#include <vector>

#include "activation/activation.h"
#include "activation/activation_checks.h"
#include "common/dims.h"
#include "linear/linear.h"
#include "linear/linear_checks.h"
#include "linear/weight_tensor.h"

namespace hybrid {
namespace {

using at::Tensor;

void add_low_rank_(const Tensor& x, const Tensor& y, const Tensor& lora_a, const Tensor& lora_b, double scale,
                   at::IntArrayRef splits, const Dims& dims) {
  const int64_t width = dims["S*R"];
  const Tensor a = lora_a.contiguous(), b = lora_b.contiguous();
  const Tensor scratch = at::empty({dims.leading(), width}, x.options());
  add_low_rank({.x = x.const_data_ptr<float>(),
                .ldx = dims["K"],
                .a = a.const_data_ptr<float>(),
                .b = b.const_data_ptr<float>(),
                .splits = splits.data(),
                .num_splits = static_cast<int64_t>(splits.size()),
                .R = dims["R"],
                .scale = static_cast<float>(scale),
                .y = y.mutable_data_ptr<float>(),
                .ldy = dims["N"],
                .M = dims.leading(),
                .N = dims["N"],
                .K = dims["K"],
                .scratch = scratch.mutable_data_ptr<float>()});
}

Tensor layer(const char* op, const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_,
             const std::optional<Tensor>& lora_a, const std::optional<Tensor>& lora_b, double lora_scale,
             at::IntArrayRef lora_splits) {
  Dims dims(op);
  dims.expect(x_, "x", {"...", "K"})
      .expect(weight_, "weight", {"N", "K"}, weight_type(weight_))
      .expect(bias_, "bias", {"N"});
  expect_low_rank(op, dims, at::kFloat, lora_a, lora_b, lora_splits);
  const Tensor x = x_.contiguous(), weight = weight_.contiguous();
  const Tensor bias = bias_ ? bias_->contiguous() : Tensor();
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = dims["N"];
  const Tensor y = at::empty(shape, x.options());
  linear({.x = x.const_data_ptr<float>(),
          .ldx = dims["K"],
          .w = weight_of(weight),
          .ldw = dims["K"],
          .bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr,
          .y = y.mutable_data_ptr<float>(),
          .ldy = dims["N"],
          .M = dims.leading(),
          .N = dims["N"],
          .K = dims["K"]});
  if (lora_a) add_low_rank_(x, y, *lora_a, *lora_b, lora_scale, lora_splits, dims);
  return y;
}

Tensor linear_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& lora_a,
                  const std::optional<Tensor>& lora_b, double lora_scale, at::IntArrayRef lora_splits) {
  return layer("linear", x, weight, bias, lora_a, lora_b, lora_scale, lora_splits);
}

Tensor linear_activation_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                             const std::optional<Tensor>& lora_a, const std::optional<Tensor>& lora_b, double lora_scale,
                             at::IntArrayRef lora_splits, std::string_view kind_, bool gated) {
  constexpr const char* kOp = "linear_activation";
  const Activation kind = checked_kind(kOp, kind_);
  const Tensor before = layer(kOp, x, weight, bias, lora_a, lora_b, lora_scale, lora_splits);
  const int64_t cols = activated_width(kOp, weight.size(0), gated);
  std::vector<int64_t> shape = before.sizes().vec();
  shape.back() = cols;
  const int64_t rows = c10::multiply_integers(shape.begin(), shape.end() - 1);
  float* in = before.mutable_data_ptr<float>();
  if (!gated) {
    bias_activation(in, nullptr, in, rows, cols, kind);
    return before;
  }
  const Tensor y = at::empty(shape, before.options());
  gated_activation(in, y.mutable_data_ptr<float>(), rows, cols, kind);
  return y;
}

Tensor matmul_cpu(const Tensor& a_, const Tensor& b_) {
  Dims dims("matmul");
  dims.expect(a_, "a", {"M", "K"}).expect(b_, "b", {"K", "N"});
  const Tensor a = a_.stride(0) == 1 || a_.stride(1) == 1 ? a_ : a_.contiguous();
  const Tensor b = b_.stride(1) == 1 && b_.stride(0) >= dims["N"] ? b_ : b_.contiguous();
  const Tensor y = at::empty({dims["M"], dims["N"]}, a.options());
  matmul({.a = a.const_data_ptr<float>(),
          .a_row = a.stride(0),
          .a_col = a.stride(1),
          .b = b.const_data_ptr<float>(),
          .ldb = b.stride(0),
          .y = y.mutable_data_ptr<float>(),
          .ldy = dims["N"],
          .M = dims["M"],
          .N = dims["N"],
          .K = dims["K"]});
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CPU, m) {
  m.impl("linear", linear_cpu);
  m.impl("linear_activation", linear_activation_cpu);
  m.impl("matmul", matmul_cpu);
}

}  // namespace hybrid
