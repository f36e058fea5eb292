#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <numeric>
#include <vector>

#include "common/cuda_op.h"
#include "common/dims.h"
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

Tensor skinny(const Tensor& x, const Tensor& weight, const Tensor& bias, const LowRank& low, const OnDevice& here) {
  const int64_t rows = x.size(0), outputs = weight.size(0);
  const Tensor y = at::empty({rows, outputs}, x.options());
  const bool has_low = low.a.defined();
  const int64_t rank = has_low ? low.b.size(1) : 0;
  const auto splits = static_cast<int64_t>(low.splits.size());
  const Tensor inner = at::empty({rows, has_low ? splits * rank : 0}, x.options().dtype(at::kFloat));
  dispatch_float("linear", x, [&](auto kind) {
    using T = decltype(kind);
    cuda::SkinnyLinearParams<T> params{.x = input<T>(x),
                                       .weight = input<T>(weight),
                                       .bias = input<T>(bias),
                                       .y = output<T>(y),
                                       .rows = rows,
                                       .N = outputs,
                                       .K = x.size(1),
                                       .lora_a = input<T>(low.a),
                                       .lora_b = input<T>(low.b),
                                       .inner = output<float>(inner),
                                       .scale = static_cast<float>(low.scale),
                                       .rank = static_cast<int>(rank),
                                       .splits = static_cast<int>(splits),
                                       .split_end = {}};
    std::partial_sum(low.splits.begin(), low.splits.end(), params.split_end);
    cuda::skinny_linear(params, here.stream);
  });
  return y;
}

// cuBLAS by way of torch.
Tensor wide(const Tensor& x, const Tensor& weight, const Tensor& bias, const LowRank& low) {
  Tensor y = at::linear(x, weight, bias.defined() ? std::optional<Tensor>(bias) : std::nullopt);
  if (!low.a.defined()) return y;
  const Tensor inner = at::linear(x, low.a);
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
Tensor linear_cuda(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_,
                   const std::optional<Tensor>& lora_a, const std::optional<Tensor>& lora_b, double lora_scale,
                   at::IntArrayRef lora_splits) {
  const at::ScalarType dtype = x_.scalar_type();
  Dims dims("linear", at::kCUDA);
  dims.expect(x_, "x", {"...", "K"}, dtype).expect(weight_, "weight", {"N", "K"}, dtype).expect(bias_, "bias", {"N"}, dtype);
  TORCH_CHECK_VALUE(lora_a.has_value() == lora_b.has_value(), "linear: lora_a and lora_b come together; expected both or none");
  if (lora_a) {
    dims.expect(lora_b, "lora_b", {"N", "R"}, dtype);
    const int64_t total = std::accumulate(lora_splits.begin(), lora_splits.end(), int64_t{0});
    TORCH_CHECK_VALUE(total == dims["N"], "linear: lora_splits ", lora_splits, " sum to ", total, "; expected N=", dims["N"],
                      " (from weight)");
    dims.bind("S*R", static_cast<int64_t>(lora_splits.size()) * dims["R"], "lora_splits and lora_b");
    dims.expect(lora_a, "lora_a", {"S*R", "K"}, dtype);
  }
  const OnDevice here(x_);
  const Tensor x = x_.contiguous().view({dims.leading(), dims["K"]}), weight = weight_.contiguous(), bias = contiguous(bias_);
  const LowRank low{contiguous(lora_a), contiguous(lora_b), lora_scale, lora_a ? lora_splits : at::IntArrayRef()};
  const bool few = x.size(0) <= cuda::kSkinnyRows && low.splits.size() <= cuda::kMaxLinearSplits;
  std::vector<int64_t> shape = x_.sizes().vec();
  shape.back() = dims["N"];
  return (few ? skinny(x, weight, bias, low, here) : wide(x, weight, bias, low)).view(shape);
}

namespace {

Tensor matmul_cuda(const Tensor& a, const Tensor& b) {
  Dims dims("matmul", at::kCUDA);
  dims.expect(a, "a", {"M", "K"}, a.scalar_type()).expect(b, "b", {"K", "N"}, a.scalar_type());
  return a.matmul(b);
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CUDA, m) {
  m.impl("linear", linear_cuda);
  m.impl("matmul", matmul_cuda);
}

}  // namespace hybrid
