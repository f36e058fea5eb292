// What both devices' tensor functions check before they call a kernel.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <numeric>

#include "common/dims.h"

namespace hybrid {

// lora_a and lora_b may be fp32 or the weight's dtype, and are computed with in fp32.
inline at::ScalarType factor_dtype(const at::Tensor& factor, const at::Tensor& weight) {
  return factor.scalar_type() == weight.scalar_type() ? weight.scalar_type() : at::kFloat;
}

// Binds N, K, R and S*R in `dims`: weight [N, K], lora_b [N, R], lora_a [S*R, K], S splits that sum to N.
inline void check_factors(const char* op, Dims& dims, const at::Tensor& weight, const at::Tensor& lora_a,
                          const at::Tensor& lora_b, at::IntArrayRef splits) {
  TORCH_CHECK_VALUE(!splits.empty() && std::all_of(splits.begin(), splits.end(), [](int64_t s) { return s > 0; }), op,
                    ": splits is ", splits, "; expected one positive width a split");
  dims.expect(weight, "weight", {"N", "K"}, weight.scalar_type())
      .expect(lora_b, "lora_b", {"N", "R"}, factor_dtype(lora_b, weight))
      .bind("S*R", static_cast<int64_t>(splits.size()) * dims["R"], "splits and lora_b")
      .expect(lora_a, "lora_a", {"S*R", "K"}, factor_dtype(lora_a, weight));
  const int64_t total = std::accumulate(splits.begin(), splits.end(), int64_t{0});
  TORCH_CHECK_VALUE(total == dims["N"], op, ": splits ", splits, " sum to ", total, "; expected N=", dims["N"]);
}

inline void check_in_place(const char* op, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(weight.is_contiguous(), op, ": weight has strides ", weight.strides(),
                    "; expected contiguous rows, since it is changed in place");
}

}  // namespace hybrid
