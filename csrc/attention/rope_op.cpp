#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <tuple>

#include "attention/attention.h"
#include "attention/attention_checks.h"
#include "common/dims.h"

namespace hybrid {
namespace {

using at::Tensor;

const float* data(const Tensor& tensor) { return tensor.const_data_ptr<float>(); }

const int32_t* checked_positions(const char* op, const Dims& dims, const Tensor& positions) {
  const int32_t* at = positions.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < dims["T"]; ++i) {
    TORCH_CHECK_VALUE(at[i] >= 0 && at[i] < dims["P"], op, ": positions[", i, "] is ", at[i], "; cos holds positions 0 to ",
                      dims["P"] - 1);
  }
  return at;
}

const int64_t* checked_slots(const char* op, const Dims& dims, const Tensor& slots) {
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  const int64_t capacity = dims["blocks"] * kKvTile;
  for (int64_t i = 0; i < dims["T"]; ++i) {
    TORCH_CHECK_VALUE(slot[i] >= 0 && slot[i] < capacity, op, ": slots[", i, "] is ", slot[i], "; the cache has ", capacity,
                      " slots");
  }
  return slot;
}

std::tuple<Tensor, Tensor> rope_cpu(const Tensor& q_, const Tensor& k_, const Tensor& cos_, const Tensor& sin_,
                                    const Tensor& positions_) {
  Dims dims("rope");
  expect_rope("rope", dims, at::kFloat, q_, k_, cos_, sin_, positions_);
  const Tensor cos = cos_.contiguous(), sin = sin_.contiguous(), positions = positions_.contiguous();
  const int32_t* at = checked_positions("rope", dims, positions);
  const auto rotate = [&](const Tensor& x_) {
    const Tensor x = with_dense_rows(x_), out = at::empty(x.sizes(), x.options());
    rope({.in = data(x),
          .out = out.mutable_data_ptr<float>(),
          .in_stride = x.stride(0),
          .out_stride = out.stride(0),
          .rows = dims["T"],
          .heads = x.size(1),
          .head_dim = dims["D"],
          .rotary_dim = 2 * dims["half"],
          .cos = data(cos),
          .sin = data(sin),
          .positions = at});
    return out;
  };
  return {rotate(q_), rotate(k_)};
}

void kv_append_cpu(const Tensor& k_, const Tensor& v_, const Tensor& cache, const Tensor& slots_) {
  Dims dims("kv_append");
  expect_append("kv_append", dims, at::kFloat, k_, v_, cache, slots_);
  const Tensor k = k_.contiguous(), v = v_.contiguous(), slots = slots_.contiguous();
  kv_append(data(k), data(v), dims["KH"] * dims["D"], dims["T"], checked_slots("kv_append", dims, slots),
            {dims["KH"], dims["D"]}, cache.mutable_data_ptr<float>());
}

Tensor rope_append_cpu(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& cos_, const Tensor& sin_,
                       const Tensor& positions_, const Tensor& cache, const Tensor& slots_) {
  constexpr const char* kOp = "rope_append";
  Dims dims(kOp);
  expect_rope(kOp, dims, at::kFloat, q_, k_, cos_, sin_, positions_);
  expect_append(kOp, dims, at::kFloat, k_, v_, cache, slots_);
  const Tensor q = with_dense_rows(q_), k = with_dense_rows(k_), v = with_dense_rows(v_);
  const Tensor cos = cos_.contiguous(), sin = sin_.contiguous(), positions = positions_.contiguous(), slots = slots_.contiguous();
  const Tensor out = at::empty(q.sizes(), q.options());
  rope_append({.query = {.in = data(q),
                         .out = out.mutable_data_ptr<float>(),
                         .in_stride = q.stride(0),
                         .out_stride = out.stride(0),
                         .rows = dims["T"],
                         .heads = dims["H"],
                         .head_dim = dims["D"],
                         .rotary_dim = 2 * dims["half"],
                         .cos = data(cos),
                         .sin = data(sin),
                         .positions = checked_positions(kOp, dims, positions)},
               .k = data(k),
               .v = data(v),
               .k_stride = k.stride(0),
               .v_stride = v.stride(0),
               .slots = checked_slots(kOp, dims, slots),
               .layout = {dims["KH"], dims["D"]},
               .cache = cache.mutable_data_ptr<float>()});
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CPU, m) {
  m.impl("rope", rope_cpu);
  m.impl("kv_append", kv_append_cpu);
  m.impl("rope_append", rope_append_cpu);
}

}  // namespace hybrid
