// What the tensor functions of attention, on the CPU and on a GPU, ask of their arguments.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "common/dims.h"

namespace hybrid {

// Heads and their elements lie together; tokens may be apart, as in a fused q|k|v.
inline at::Tensor with_dense_rows(const at::Tensor& x) {
  return x.stride(2) == 1 && x.stride(1) == x.size(2) && x.stride(0) >= x.size(1) * x.size(2) ? x : x.contiguous();
}

// Queries and keys that turn, and the tables that say how.
inline void expect_rope(const char* op, Dims& dims, at::ScalarType dtype, const at::Tensor& q, const at::Tensor& k,
                        const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& positions) {
  dims.expect(q, "q", {"T", "H", "D"}, dtype)
      .expect(k, "k", {"T", "KH", "D"}, dtype)
      .expect(cos, "cos", {"P", "half"})
      .expect(sin, "sin", {"P", "half"})
      .expect(positions, "positions", {"T"}, at::kInt);
  TORCH_CHECK_VALUE(2 * dims["half"] <= dims["D"], op, ": cos has ", dims["half"], " columns, which rotate ", 2 * dims["half"],
                    " elements; expected at most D=", dims["D"], " (from q)");
}

// Keys and values, the cache that they are written to, and where.
inline void expect_append(const char* op, Dims& dims, at::ScalarType dtype, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& cache, const at::Tensor& slots) {
  dims.expect(k, "k", {"T", "KH", "D"}, dtype)
      .expect(v, "v", {"T", "KH", "D"}, dtype)
      .expect(cache, "cache", {"blocks", "KH", "2", "64", "D"}, dtype)
      .expect(slots, "slots", {"T"}, at::kLong);
  TORCH_CHECK_VALUE(cache.is_contiguous(), op, ": cache is written in place; expected it contiguous");
}

}  // namespace hybrid
