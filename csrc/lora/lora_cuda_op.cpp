#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#include "common/cuda_op.h"
#include "common/dims.h"
#include "lora/lora_checks.h"
#include "lora/lora_cuda.h"

namespace hybrid {
namespace {

using at::Tensor;

// Checked factors.
struct Factors {
  Tensor a, b;
  cuda::LoraParams params;

  Factors(const char* op, const Tensor& weight, const Tensor& a_, const Tensor& b_, double scale,
          at::IntArrayRef splits) {
    TORCH_CHECK_VALUE(splits.size() <= cuda::kMaxLoraSplits, op, ": ", splits.size(), " splits; expected at most ",
                      cuda::kMaxLoraSplits);
    Dims dims(op, at::kCUDA);
    check_factors(op, dims, weight, a_, b_, splits);
    a = a_.to(at::kFloat).contiguous();
    b = b_.to(at::kFloat).contiguous();
    params = {.a = input<float>(a),
              .b = input<float>(b),
              .scale = static_cast<float>(scale),
              .rank = static_cast<int>(dims["R"]),
              .rows = dims["N"],
              .cols = dims["K"],
              .splits = static_cast<int>(splits.size()),
              .split_end = {}};
    int64_t end = 0;
    for (size_t i = 0; i < splits.size(); ++i) params.split_end[i] = end += splits[i];
  }
};

Tensor lora_merge_cuda(const Tensor& weight_, const Tensor& lora_a, const Tensor& lora_b, double scale,
                       at::IntArrayRef splits) {
  const OnDevice here(weight_);
  const Factors factors("lora_merge", weight_, lora_a, lora_b, scale, splits);
  const Tensor weight = weight_.contiguous(), merged = at::empty_like(weight);
  dispatch_float("lora_merge", weight, [&](auto kind) {
    using T = decltype(kind);
    cuda::lora_merge(factors.params, input<T>(weight), output<T>(merged), here.stream);
  });
  return merged;
}

// The number of escapes comes back to the host, since it is a size: the one wait of this operator.
std::tuple<Tensor, Tensor, Tensor> lora_merge_in_place_cuda(Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                                                            double scale, at::IntArrayRef splits) {
  const OnDevice here(weight);
  const Factors factors("lora_merge_", weight, lora_a, lora_b, scale, splits);
  check_in_place("lora_merge_", weight);
  const int64_t tiles = cuda::lora_tiles(weight.size(0), weight.size(1), weight.element_size());
  const Tensor offsets = at::empty({tiles + 1}, weight.options().dtype(at::kLong));
  const Tensor residual = at::empty(weight.sizes(), weight.options().dtype(at::kChar));
  return dispatch_float("lora_merge_", weight, [&](auto kind) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(kind);
    cuda::lora_count_escapes(factors.params, input<T>(weight), output<int64_t>(offsets), here.stream);
    const int64_t count = offsets.select(0, tiles).item<int64_t>();
    const Tensor index = at::empty({count}, offsets.options()), value = at::empty({count}, weight.options());
    const cuda::LoraEscapes<T> escapes{output<int64_t>(index), output<T>(value)};
    cuda::lora_merge_in_place(factors.params, output<T>(weight), output<int8_t>(residual), input<int64_t>(offsets),
                              escapes, here.stream);
    return {residual, index, value};
  });
}

void lora_unmerge_in_place_cuda(Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, double scale,
                                at::IntArrayRef splits, const Tensor& residual_, const Tensor& escape_index_,
                                const Tensor& escape_value_) {
  const OnDevice here(weight);
  const Factors factors("lora_unmerge_", weight, lora_a, lora_b, scale, splits);
  check_in_place("lora_unmerge_", weight);
  Dims dims("lora_unmerge_", at::kCUDA);
  dims.expect(weight, "weight", {"N", "K"}, weight.scalar_type())
      .expect(residual_, "residual", {"N", "K"}, at::kChar)
      .expect(escape_index_, "escape_index", {"E"}, at::kLong)
      .expect(escape_value_, "escape_value", {"E"}, weight.scalar_type());
  const Tensor residual = residual_.contiguous(), index = escape_index_.contiguous(),
               value = escape_value_.contiguous();
  dispatch_float("lora_unmerge_", weight, [&](auto kind) {
    using T = decltype(kind);
    // The kernel only reads them.
    const cuda::LoraEscapes<T> escapes{const_cast<int64_t*>(input<int64_t>(index)), const_cast<T*>(input<T>(value))};
    cuda::lora_unmerge_in_place(factors.params, output<T>(weight), input<int8_t>(residual), escapes, dims["E"],
                                here.stream);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CUDA, m) {
  m.impl("lora_merge", lora_merge_cuda);
  m.impl("lora_merge_", lora_merge_in_place_cuda);
  m.impl("lora_unmerge_", lora_unmerge_in_place_cuda);
}

}  // namespace hybrid
