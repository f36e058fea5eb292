#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <tuple>

#include "attention/attention_cuda.h"
#include "common/cuda_op.h"
#include "common/dims.h"

namespace hybrid {
namespace {

using at::Tensor;

// Lengths, block tables and positions stay on the device and are not looked at here: that would wait for the stream.
std::tuple<Tensor, Tensor> paged_attention_cuda(const Tensor& q_, const Tensor& cache_, const Tensor& block_tables_,
                                                const Tensor& kv_lengths_, const Tensor& cu_q_, double scale,
                                                const std::optional<Tensor>& alibi_slopes_, int64_t window) {
  constexpr const char* kOp = "paged_attention";
  const at::ScalarType dtype = q_.scalar_type();
  Dims dims(kOp, at::kCUDA);
  dims.expect(q_, "q", {"T", "H", "D"}, dtype)
      .expect(cache_, "cache", {"blocks", "KH", "2", "64", "D"}, dtype)
      .expect(block_tables_, "block_tables", {"B", "max_blocks"}, at::kInt)
      .expect(kv_lengths_, "kv_lengths", {"B"}, at::kInt)
      .bind("B+1", dims["B"] + 1, "block_tables")
      .expect(cu_q_, "cu_q", {"B+1"}, at::kInt)
      .expect(alibi_slopes_, "alibi_slopes", {"H"});
  TORCH_CHECK_VALUE(dims["KH"] > 0 && dims["H"] % dims["KH"] == 0, kOp, ": q has ", dims["H"], " heads and cache ", dims["KH"],
                    "; expected a multiple");
  TORCH_CHECK_VALUE(window >= 0, kOp, ": window is ", window, "; expected at least 0");
  const OnDevice here(q_);
  const Tensor q = q_.contiguous(), cache = cache_.contiguous(), block_tables = block_tables_.contiguous();
  const Tensor kv_lengths = kv_lengths_.contiguous(), cu_q = cu_q_.contiguous(), alibi_slopes = contiguous(alibi_slopes_);
  const auto floats = q.options().dtype(at::kFloat);
  const int64_t chunks = cuda::attention_chunks(dims["max_blocks"]);
  const Tensor out = at::empty_like(q), lse = at::empty({dims["H"], dims["T"]}, floats);
  const Tensor partial = at::empty({dims["T"], dims["H"], chunks, dims["D"] + 2}, floats);
  dispatch_float(kOp, q, [&](auto kind) {
    using T = decltype(kind);
    cuda::paged_attention<T>({.q = input<T>(q),
                              .cache = input<T>(cache),
                              .block_tables = input<int32_t>(block_tables),
                              .kv_lengths = input<int32_t>(kv_lengths),
                              .cu_q = input<int32_t>(cu_q),
                              .alibi_slopes = input<float>(alibi_slopes),
                              .out = output<T>(out),
                              .lse = output<float>(lse),
                              .partial = output<float>(partial),
                              .rows = dims["T"],
                              .batch = dims["B"],
                              .heads = dims["H"],
                              .kv_heads = dims["KH"],
                              .head_dim = dims["D"],
                              .max_blocks = dims["max_blocks"],
                              .window = window,
                              .scale = static_cast<float>(scale)},
                             here.stream);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor> rope_cuda(const Tensor& q_, const Tensor& k_, const Tensor& cos_, const Tensor& sin_,
                                     const Tensor& positions_) {
  const at::ScalarType dtype = q_.scalar_type();
  Dims dims("rope", at::kCUDA);
  dims.expect(q_, "q", {"T", "H", "D"}, dtype)
      .expect(k_, "k", {"T", "KH", "D"}, dtype)
      .expect(cos_, "cos", {"P", "half"})
      .expect(sin_, "sin", {"P", "half"})
      .expect(positions_, "positions", {"T"}, at::kInt);
  const int64_t rotary = 2 * dims["half"], head_dim = dims["D"];
  TORCH_CHECK_VALUE(rotary <= head_dim, "rope: cos has ", dims["half"], " columns, which rotate ", rotary,
                    " elements; expected at most D=", head_dim, " (from q)");
  const OnDevice here(q_);
  const Tensor cos = cos_.contiguous(), sin = sin_.contiguous(), positions = positions_.contiguous();
  const auto rotate = [&](const Tensor& x_) {
    const Tensor x = x_.contiguous(), out = at::empty_like(x);
    dispatch_float("rope", x, [&](auto kind) {
      using T = decltype(kind);
      cuda::rope<T>({.in = input<T>(x),
                     .out = output<T>(out),
                     .cos = input<float>(cos),
                     .sin = input<float>(sin),
                     .positions = input<int32_t>(positions),
                     .rows = x.size(0),
                     .heads = x.size(1),
                     .head_dim = head_dim,
                     .rotary = rotary},
                    here.stream);
    });
    return out;
  };
  return {rotate(q_), rotate(k_)};
}

void kv_append_cuda(const Tensor& k_, const Tensor& v_, const Tensor& cache, const Tensor& slots_) {
  const at::ScalarType dtype = k_.scalar_type();
  Dims dims("kv_append", at::kCUDA);
  dims.expect(k_, "k", {"T", "KH", "D"}, dtype)
      .expect(v_, "v", {"T", "KH", "D"}, dtype)
      .expect(cache, "cache", {"blocks", "KH", "2", "64", "D"}, dtype)
      .expect(slots_, "slots", {"T"}, at::kLong);
  TORCH_CHECK_VALUE(cache.is_contiguous(), "kv_append: cache is written in place; expected it contiguous");
  const OnDevice here(k_);
  const Tensor k = k_.contiguous(), v = v_.contiguous(), slots = slots_.contiguous();
  dispatch_float("kv_append", k, [&](auto kind) {
    using T = decltype(kind);
    cuda::kv_append<T>({.k = input<T>(k),
                        .v = input<T>(v),
                        .slots = input<int64_t>(slots),
                        .cache = output<T>(cache),
                        .rows = dims["T"],
                        .kv_heads = dims["KH"],
                        .head_dim = dims["D"]},
                       here.stream);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CUDA, m) {
  m.impl("paged_attention", paged_attention_cuda);
  m.impl("rope", rope_cuda);
  m.impl("kv_append", kv_append_cuda);
}

}  // namespace hybrid
