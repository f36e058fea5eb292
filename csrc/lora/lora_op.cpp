#include "lora/lora.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <tuple>

#include "common/dims.h"
#include "lora/lora_checks.h"

namespace hybrid {
namespace {

using at::Tensor;

template <typename Weight>
Weight* data(const Tensor& tensor) {
  return static_cast<Weight*>(tensor.mutable_data_ptr());
}

// Calls fn with a value of the C++ type that stands for the weight's dtype.
template <typename Fn>
auto dispatch_weight(const Tensor& weight, const Fn& fn) {
  return weight.scalar_type() == at::kFloat ? fn(float{}) : fn(BFloat16{});
}

// Checked factors.
struct Factors {
  Tensor a, b;
  LoraFactors args;

  Factors(const char* op, const Tensor& weight, const Tensor& a_, const Tensor& b_, double scale,
          at::IntArrayRef splits) {
    TORCH_CHECK_VALUE(weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kBFloat16, op,
                      ": weight has dtype ", c10::toString(weight.scalar_type()), "; expected Float or BFloat16");
    Dims dims(op);
    check_factors(op, dims, weight, a_, b_, splits);
    a = a_.to(at::kFloat).contiguous();
    b = b_.to(at::kFloat).contiguous();
    args = {.a = a.const_data_ptr<float>(),
            .b = b.const_data_ptr<float>(),
            .splits = splits.data(),
            .num_splits = static_cast<int64_t>(splits.size()),
            .R = dims["R"],
            .scale = static_cast<float>(scale),
            .N = dims["N"],
            .K = dims["K"]};
  }
};

Tensor lora_merge_cpu(const Tensor& weight_, const Tensor& lora_a, const Tensor& lora_b, double scale,
                      at::IntArrayRef splits) {
  const Factors factors("lora_merge", weight_, lora_a, lora_b, scale, splits);
  const Tensor weight = weight_.contiguous();
  Tensor merged = at::empty_like(weight);
  dispatch_weight(weight, [&](auto kind) {
    using Weight = decltype(kind);
    lora_merge(static_cast<const Weight*>(weight.const_data_ptr()), factors.args, data<Weight>(merged));
  });
  return merged;
}

std::tuple<Tensor, Tensor, Tensor> lora_merge_in_place_cpu(Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                                                           double scale, at::IntArrayRef splits) {
  const Factors factors("lora_merge_", weight, lora_a, lora_b, scale, splits);
  check_in_place("lora_merge_", weight);
  Tensor residual = at::empty(weight.sizes(), at::kChar);
  return dispatch_weight(weight, [&](auto kind) -> std::tuple<Tensor, Tensor, Tensor> {
    using Weight = decltype(kind);
    const auto escapes = lora_merge_in_place(data<Weight>(weight), factors.args, residual.mutable_data_ptr<int8_t>());
    const auto count = static_cast<int64_t>(escapes.size());
    Tensor index = at::empty({count}, at::kLong), value = at::empty({count}, weight.options());
    for (int64_t e = 0; e < count; ++e) {
      index.mutable_data_ptr<int64_t>()[e] = escapes[e].index;
      data<Weight>(value)[e] = escapes[e].value;
    }
    return {residual, index, value};
  });
}

void lora_unmerge_in_place_cpu(Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, double scale,
                               at::IntArrayRef splits, const Tensor& residual_, const Tensor& escape_index_,
                               const Tensor& escape_value_) {
  const Factors factors("lora_unmerge_", weight, lora_a, lora_b, scale, splits);
  check_in_place("lora_unmerge_", weight);
  Dims dims("lora_unmerge_");
  dims.expect(weight, "weight", {"N", "K"}, weight.scalar_type())
      .expect(residual_, "residual", {"N", "K"}, at::kChar)
      .expect(escape_index_, "escape_index", {"E"}, at::kLong)
      .expect(escape_value_, "escape_value", {"E"}, weight.scalar_type());
  const Tensor residual = residual_.contiguous(), index = escape_index_.contiguous(),
               value = escape_value_.contiguous();
  const int64_t* position = index.const_data_ptr<int64_t>();
  for (int64_t e = 0; e < dims["E"]; ++e) {
    TORCH_CHECK_VALUE(position[e] >= 0 && position[e] < weight.numel(), "lora_unmerge_: escape_index[", e, "] is ",
                      position[e], "; expected 0 <= index < N*K=", weight.numel());
  }
  dispatch_weight(weight, [&](auto kind) {
    using Weight = decltype(kind);
    lora_unmerge_in_place(data<Weight>(weight), factors.args, residual.const_data_ptr<int8_t>(), position,
                          static_cast<const Weight*>(value.const_data_ptr()), dims["E"]);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CPU, m) {
  m.impl("lora_merge", lora_merge_cpu);
  m.impl("lora_merge_", lora_merge_in_place_cpu);
  m.impl("lora_unmerge_", lora_unmerge_in_place_cpu);
}

}  // namespace hybrid
