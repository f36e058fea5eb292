#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <tuple>

#include "attention/attention.h"
#include "common/dims.h"

namespace hybrid {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> rope_cpu(const Tensor& q_, const Tensor& k_, const Tensor& cos_, const Tensor& sin_,
                                    const Tensor& positions_) {
  Dims dims("rope");
  dims.expect(q_, "q", {"T", "H", "D"})
      .expect(k_, "k", {"T", "KH", "D"})
      .expect(cos_, "cos", {"P", "half"})
      .expect(sin_, "sin", {"P", "half"})
      .expect(positions_, "positions", {"T"}, at::kInt);
  const int64_t rotary = 2 * dims["half"], head_dim = dims["D"], known = dims["P"];
  TORCH_CHECK_VALUE(rotary <= head_dim, "rope: cos has ", dims["half"], " columns, which rotate ", rotary,
                    " elements; expected at most D=", head_dim, " (from q)");
  const Tensor cos = cos_.contiguous(), sin = sin_.contiguous(), positions = positions_.contiguous();
  const int32_t* at = positions.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < dims["T"]; ++i) {
    TORCH_CHECK_VALUE(at[i] >= 0 && at[i] < known, "rope: positions[", i, "] is ", at[i], "; cos holds positions 0 to ", known - 1);
  }
  const auto rotate = [&](const Tensor& x_) {
    const Tensor x = x_.contiguous(), out = at::empty(x.sizes(), x.options());
    const int64_t heads = x.size(1);
    rope({.in = x.const_data_ptr<float>(),
          .out = out.mutable_data_ptr<float>(),
          .in_stride = heads * head_dim,
          .out_stride = heads * head_dim,
          .rows = x.size(0),
          .heads = heads,
          .head_dim = head_dim,
          .rotary_dim = rotary,
          .cos = cos.const_data_ptr<float>(),
          .sin = sin.const_data_ptr<float>(),
          .positions = at});
    return out;
  };
  return {rotate(q_), rotate(k_)};
}

void kv_append_cpu(const Tensor& k_, const Tensor& v_, const Tensor& cache, const Tensor& slots_) {
  Dims dims("kv_append");
  dims.expect(k_, "k", {"T", "KH", "D"})
      .expect(v_, "v", {"T", "KH", "D"})
      .expect(cache, "cache", {"blocks", "KH", "2", "64", "D"})
      .expect(slots_, "slots", {"T"}, at::kLong);
  TORCH_CHECK_VALUE(cache.is_contiguous(), "kv_append: cache is written in place; expected it contiguous");
  const Tensor k = k_.contiguous(), v = v_.contiguous(), slots = slots_.contiguous();
  const int64_t capacity = dims["blocks"] * kKvTile;
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < dims["T"]; ++i) {
    TORCH_CHECK_VALUE(slot[i] >= 0 && slot[i] < capacity, "kv_append: slots[", i, "] is ", slot[i], "; the cache has ", capacity,
                      " slots");
  }
  const KvCacheLayout layout{dims["KH"], dims["D"]};
  kv_append(k.const_data_ptr<float>(), v.const_data_ptr<float>(), dims["KH"] * dims["D"], dims["T"], slot, layout,
            cache.mutable_data_ptr<float>());
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CPU, m) {
  m.impl("rope", rope_cpu);
  m.impl("kv_append", kv_append_cpu);
}

}  // namespace hybrid
