// What the linear layer's tensor functions, on the CPU and on a GPU, ask of their arguments.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <numeric>
#include <optional>

#include "common/dims.h"

namespace hybrid {

// The factors of the low-rank term: both or none, one pair a split.
inline void expect_low_rank(const char* op, Dims& dims, at::ScalarType dtype, const std::optional<at::Tensor>& lora_a,
                            const std::optional<at::Tensor>& lora_b, at::IntArrayRef splits) {
  TORCH_CHECK_VALUE(lora_a.has_value() == lora_b.has_value(), op, ": lora_a and lora_b come together; expected both or none");
  if (!lora_a) return;
  dims.expect(lora_b, "lora_b", {"N", "R"}, dtype);
  const int64_t total = std::accumulate(splits.begin(), splits.end(), int64_t{0});
  TORCH_CHECK_VALUE(total == dims["N"], op, ": lora_splits ", splits, " sum to ", total, "; expected N=", dims["N"], " (from weight)");
  dims.bind("S*R", static_cast<int64_t>(splits.size()) * dims["R"], "lora_splits and lora_b");
  dims.expect(lora_a, "lora_a", {"S*R", "K"}, dtype);
}

// Columns that an activation leaves of N.
inline int64_t activated_width(const char* op, int64_t N, bool gated) {
  TORCH_CHECK_VALUE(!gated || N % 2 == 0, op, ": weight has ", N, " rows; expected gate and up, an even number");
  return gated ? N / 2 : N;
}

}  // namespace hybrid
