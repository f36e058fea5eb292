#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <numeric>
#include <string_view>
#include <vector>

#include "activation/activation_checks.h"
#include "activation/activation_cuda.h"
#include "common/cuda_op.h"
#include "common/dims.h"
#include "linear/linear_checks.h"
#include "linear/linear_cuda.h"
#include "linear/linear_cuda_op.h"

namespace hybrid {
namespace {

using at::Tensor;

struct LowRank {
  Tensor a, b;  // undefined: none
  double scale;
  at::IntArrayRef splits;
};

// What the arguments of both operators come to.
struct Layer {
  Tensor x, weight, bias;
  LowRank low;
  std::vector<int64_t> shape;  // of y

  Layer(const char* op, const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_,
        const std::optional<Tensor>& lora_a, const std::optional<Tensor>& lora_b, double lora_scale, at::IntArrayRef lora_splits) {
    const at::ScalarType dtype = x_.scalar_type();
    Dims dims(op, at::kCUDA);
    dims.expect(x_, "x", {"...", "K"}, dtype).expect(weight_, "weight", {"N", "K"}, dtype).expect(bias_, "bias", {"N"}, dtype);
    expect_low_rank(op, dims, dtype, lora_a, lora_b, lora_splits);
    x = x_.contiguous().view({dims.leading(), dims["K"]});
    weight = weight_.contiguous();
    bias = contiguous(bias_);
    low = {contiguous(lora_a), contiguous(lora_b), lora_scale, lora_a ? lora_splits : at::IntArrayRef()};
    shape = x_.sizes().vec();
    shape.back() = dims["N"];
  }

  bool is_skinny() const { return x.size(0) <= cuda::kSkinnyRows && low.splits.size() <= cuda::kMaxLinearSplits; }
};

// Calls run(the parameters of the skinny kernel), y being where they lead.
template <typename Run>
void with_skinny(const char* op, const Layer& layer, const Tensor& y, const Run& run) {
  const LowRank& low = layer.low;
  const bool has_low = low.a.defined();
  const int64_t rows = layer.x.size(0), rank = has_low ? low.b.size(1) : 0;
  const auto splits = static_cast<int64_t>(low.splits.size());
  const Tensor inner = at::empty({rows, has_low ? splits * rank : 0}, layer.x.options().dtype(at::kFloat));
  dispatch_float(op, layer.x, [&](auto kind) {
    using T = decltype(kind);
    cuda::SkinnyLinearParams<T> params{.x = input<T>(layer.x),
                                       .weight = input<T>(layer.weight),
                                       .bias = input<T>(layer.bias),
                                       .y = output<T>(y),
                                       .rows = rows,
                                       .N = layer.weight.size(0),
                                       .K = layer.x.size(1),
                                       .lora_a = input<T>(low.a),
                                       .lora_b = input<T>(low.b),
                                       .inner = output<float>(inner),
                                       .scale = static_cast<float>(low.scale),
                                       .rank = static_cast<int>(rank),
                                       .splits = static_cast<int>(splits),
                                       .split_end = {}};
    std::partial_sum(low.splits.begin(), low.splits.end(), params.split_end);
    run(params);
  });
}

Tensor skinny(const Layer& layer, const OnDevice& here) {
  const Tensor y = at::empty({layer.x.size(0), layer.weight.size(0)}, layer.x.options());
  with_skinny("linear", layer, y, [&](const auto& params) { cuda::skinny_linear(params, here.stream); });
  return y;
}

// cuBLAS by way of torch.
Tensor wide(const Layer& layer) {
  const LowRank& low = layer.low;
  Tensor y = at::linear(layer.x, layer.weight, layer.bias.defined() ? std::optional<Tensor>(layer.bias) : std::nullopt);
  if (!low.a.defined()) return y;
  const Tensor inner = at::linear(layer.x, low.a);
  const int64_t rank = low.b.size(1);
  int64_t begin = 0;
  for (size_t i = 0; i < low.splits.size(); ++i) {
    const Tensor b = low.b.narrow(0, begin, low.splits[i]);
    y.narrow(1, begin, low.splits[i]).addmm_(inner.narrow(1, static_cast<int64_t>(i) * rank, rank), b.t(), 1, low.scale);
    begin += low.splits[i];
  }
  return y;
}

}  // namespace

// Up to 16 rows by the kernel of linear_cuda.h, more by cuBLAS: those two do not give the same bits.
Tensor linear_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& lora_a,
                   const std::optional<Tensor>& lora_b, double lora_scale, at::IntArrayRef lora_splits) {
  const Layer layer("linear", x, weight, bias, lora_a, lora_b, lora_scale, lora_splits);
  const OnDevice here(x);
  return (layer.is_skinny() ? skinny(layer, here) : wide(layer)).view(layer.shape);
}

namespace {

// The activation in the epilogue, or behind cuBLAS.
Tensor linear_activation_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                              const std::optional<Tensor>& lora_a, const std::optional<Tensor>& lora_b, double lora_scale,
                              at::IntArrayRef lora_splits, std::string_view kind_, bool gated) {
  constexpr const char* kOp = "linear_activation";
  Layer layer(kOp, x, weight, bias, lora_a, lora_b, lora_scale, lora_splits);
  const Activation kind = checked_kind(kOp, kind_);
  const int64_t rows = layer.x.size(0), cols = activated_width(kOp, weight.size(0), gated);
  layer.shape.back() = cols;
  const OnDevice here(x);
  const Tensor y = at::empty({rows, cols}, layer.x.options());
  if (layer.is_skinny()) {
    with_skinny(kOp, layer, y, [&](const auto& params) { cuda::skinny_linear_activation(params, kind, gated, here.stream); });
    return y.view(layer.shape);
  }
  const Tensor before = wide(layer);
  dispatch_float(kOp, x, [&](auto type) {
    using T = decltype(type);
    if (gated) {
      cuda::gated_activation<T>({.gate_up = input<T>(before), .y = output<T>(y), .rows = rows, .cols = cols}, kind, here.stream);
    } else {
      cuda::bias_activation<T>({.x = input<T>(before), .bias = nullptr, .y = output<T>(y), .rows = rows, .cols = cols}, kind, here.stream);
    }
  });
  return y.view(layer.shape);
}

Tensor matmul_cuda(const Tensor& a, const Tensor& b) {
  Dims dims("matmul", at::kCUDA);
  dims.expect(a, "a", {"M", "K"}, a.scalar_type()).expect(b, "b", {"K", "N"}, a.scalar_type());
  return a.matmul(b);
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CUDA, m) {
  m.impl("linear", linear_cuda);
  m.impl("linear_activation", linear_activation_cuda);
  m.impl("matmul", matmul_cuda);
}

}  // namespace hybrid
