#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <tuple>

#include "attention/attention_checks.h"
#include "attention/attention_cuda.h"
#include "common/cuda_op.h"
#include "common/dims.h"

namespace hybrid {
namespace {

using at::Tensor;

// Lengths, block tables and positions stay on the device and are not looked at here: that would wait for the stream.

void check_heads(const char* op, const Dims& dims, int64_t window) {
  TORCH_CHECK_VALUE(dims["KH"] > 0 && dims["H"] % dims["KH"] == 0, op, ": ", dims["H"], " query heads over ", dims["KH"],
                    " key/value heads; expected a multiple");
  TORCH_CHECK_VALUE(window >= 0, op, ": window is ", window, "; expected a number of keys, or 0 for all");
}

bool flash_takes(const Tensor& q) { return q.scalar_type() == at::kFloat || q.size(2) <= cuda::kFlashHeadDim; }

void check_head_dim(const char* op, const Tensor& q) {
  TORCH_CHECK_VALUE(flash_takes(q), op, ": q has head size ", q.size(2), "; on CUDA expected at most ", cuda::kFlashHeadDim,
                    " for 16-bit types");
}

// What few and many rows have in common.
struct Forward {
  Tensor q, out, lse, cu_q, alibi_slopes;

  Forward(const Dims& dims, const Tensor& q_, const Tensor& cu_q_, const std::optional<Tensor>& alibi_slopes_)
      : q(with_dense_rows(q_)),
        out(at::empty({dims["T"], dims["H"], dims["D"]}, q.options())),
        lse(at::empty({dims["H"], dims["T"]}, q.options().dtype(at::kFloat))),
        cu_q(cu_q_.contiguous()),
        alibi_slopes(contiguous(alibi_slopes_)) {}

  // All but keys and values.
  template <typename T>
  cuda::FlashAttentionParams<T> params(const Dims& dims, double scale, int64_t window) const {
    cuda::FlashAttentionParams<T> p{};
    p.q = input<T>(q);
    p.cu_q = input<int32_t>(cu_q);
    p.alibi_slopes = input<float>(alibi_slopes);
    p.out = output<T>(out);
    p.lse = output<float>(lse);
    p.rows = dims["T"];
    p.heads = dims["H"];
    p.kv_heads = dims["KH"];
    p.head_dim = dims["D"];
    p.q_stride = q.stride(0);
    p.batch = cu_q.size(0) - 1;
    p.window = window;
    p.scale = static_cast<float>(scale);
    return p;
  }
};

Dims packed_dims(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                 const std::optional<Tensor>& alibi_slopes, int64_t window) {
  Dims dims(op, at::kCUDA);
  dims.expect(q, "q", {"T", "H", "D"}, q.scalar_type())
      .expect(k, "k", {"T", "KH", "D"}, q.scalar_type())
      .expect(v, "v", {"T", "KH", "D"}, q.scalar_type())
      .expect(cu_seqlens, "cu_seqlens", {"B+1"}, at::kInt)
      .expect(alibi_slopes, "alibi_slopes", {"H"});
  check_heads(op, dims, window);
  check_head_dim(op, q);
  return dims;
}

std::tuple<Tensor, Tensor> attention_cuda(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& cu_seqlens,
                                          double scale, const std::optional<Tensor>& alibi_slopes, int64_t window) {
  const Dims dims = packed_dims("attention", q_, k_, v_, cu_seqlens, alibi_slopes, window);
  const OnDevice here(q_);
  const Forward forward(dims, q_, cu_seqlens, alibi_slopes);
  const Tensor k = with_dense_rows(k_), v = with_dense_rows(v_);
  dispatch_float("attention", q_, [&](auto kind) {
    using T = decltype(kind);
    auto params = forward.params<T>(dims, scale, window);
    params.k = input<T>(k);
    params.v = input<T>(v);
    params.k_stride = k.stride(0);
    params.v_stride = v.stride(0);
    cuda::flash_attention<T>(params, here.stream);
  });
  return {forward.out, forward.lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_cuda(const Tensor& grad_out_, const Tensor& q_, const Tensor& k_,
                                                           const Tensor& v_, const Tensor& out_, const Tensor& lse_,
                                                           const Tensor& cu_seqlens_, double scale,
                                                           const std::optional<Tensor>& alibi_slopes_, int64_t window) {
  constexpr const char* kOp = "attention_backward";
  Dims dims = packed_dims(kOp, q_, k_, v_, cu_seqlens_, alibi_slopes_, window);
  dims.expect(grad_out_, "grad_out", {"T", "H", "D"}, q_.scalar_type())
      .expect(out_, "out", {"T", "H", "D"}, q_.scalar_type())
      .expect(lse_, "lse", {"H", "T"});
  const OnDevice here(q_);
  const Tensor grad_out = grad_out_.contiguous(), out = out_.contiguous(), lse = lse_.contiguous();
  const Tensor cu_seqlens = cu_seqlens_.contiguous(), alibi_slopes = contiguous(alibi_slopes_);
  const Tensor q = with_dense_rows(q_);
  Tensor k = with_dense_rows(k_), v = with_dense_rows(v_);
  if (k.stride(0) != v.stride(0)) {
    k = k.contiguous();
    v = v.contiguous();
  }
  const Tensor delta = at::empty_like(lse), grad_q = at::empty_like(out);
  const Tensor grad_k = at::empty({dims["T"], dims["KH"], dims["D"]}, q.options()), grad_v = at::empty_like(grad_k);
  dispatch_float(kOp, q, [&](auto kind) {
    using T = decltype(kind);
    cuda::AttentionBackwardParams<T> p{};
    p.q = input<T>(q);
    p.k = input<T>(k);
    p.v = input<T>(v);
    p.out = input<T>(out);
    p.grad_out = input<T>(grad_out);
    p.lse = input<float>(lse);
    p.delta = output<float>(delta);
    p.grad_q = output<T>(grad_q);
    p.grad_k = output<T>(grad_k);
    p.grad_v = output<T>(grad_v);
    p.cu_seqlens = input<int32_t>(cu_seqlens);
    p.alibi_slopes = input<float>(alibi_slopes);
    p.tokens = dims["T"];
    p.batch = dims["B+1"] - 1;
    p.heads = dims["H"];
    p.kv_heads = dims["KH"];
    p.head_dim = dims["D"];
    p.q_stride = q.stride(0);
    p.kv_stride = k.stride(0);
    p.window = window;
    p.scale = static_cast<float>(scale);
    cuda::attention_backward<T>(p, here.stream);
  });
  return {grad_q, grad_k, grad_v};
}

// Up to this many rows a sequence, on average, the kernel for few: one reading of the keys serves 16 rows, the query heads of a
// key/value head among them. The two give the same bits.
constexpr int64_t kFewRows = 16;

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
  check_heads(kOp, dims, window);
  const OnDevice here(q_);
  const Forward forward(dims, q_, cu_q_, alibi_slopes_);
  const Tensor cache = cache_.contiguous(), block_tables = block_tables_.contiguous(), kv_lengths = kv_lengths_.contiguous();
  const bool few = dims["T"] * (dims["H"] / dims["KH"]) <= kFewRows * dims["B"] || !flash_takes(q_);
  const int64_t chunks = few ? cuda::attention_chunks(dims["max_blocks"]) : 0;
  const Tensor partial = at::empty({dims["T"], dims["H"], chunks, dims["D"] + 2}, forward.lse.options());
  dispatch_float(kOp, q_, [&](auto kind) {
    using T = decltype(kind);
    if (!few) {
      auto params = forward.params<T>(dims, scale, window);
      params.k = params.v = input<T>(cache);
      params.block_tables = input<int32_t>(block_tables);
      params.kv_lengths = input<int32_t>(kv_lengths);
      params.max_blocks = dims["max_blocks"];
      return cuda::flash_attention<T>(params, here.stream);
    }
    cuda::paged_attention<T>({.q = input<T>(forward.q),
                              .cache = input<T>(cache),
                              .block_tables = input<int32_t>(block_tables),
                              .kv_lengths = input<int32_t>(kv_lengths),
                              .cu_q = input<int32_t>(forward.cu_q),
                              .alibi_slopes = input<float>(forward.alibi_slopes),
                              .out = output<T>(forward.out),
                              .lse = output<float>(forward.lse),
                              .partial = output<float>(partial),
                              .rows = dims["T"],
                              .batch = dims["B"],
                              .heads = dims["H"],
                              .kv_heads = dims["KH"],
                              .head_dim = dims["D"],
                              .max_blocks = dims["max_blocks"],
                              .q_stride = forward.q.stride(0),
                              .window = window,
                              .scale = static_cast<float>(scale)},
                             here.stream);
  });
  return {forward.out, forward.lse};
}

std::tuple<Tensor, Tensor> rope_cuda(const Tensor& q_, const Tensor& k_, const Tensor& cos_, const Tensor& sin_,
                                     const Tensor& positions_) {
  Dims dims("rope", at::kCUDA);
  expect_rope("rope", dims, q_.scalar_type(), q_, k_, cos_, sin_, positions_);
  const OnDevice here(q_);
  const Tensor cos = cos_.contiguous(), sin = sin_.contiguous(), positions = positions_.contiguous();
  const auto rotate = [&](const Tensor& x_) {
    const Tensor x = with_dense_rows(x_), out = at::empty(x.sizes(), x.options());
    dispatch_float("rope", x, [&](auto kind) {
      using T = decltype(kind);
      cuda::rope<T>({.in = input<T>(x),
                     .out = output<T>(out),
                     .cos = input<float>(cos),
                     .sin = input<float>(sin),
                     .positions = input<int32_t>(positions),
                     .rows = dims["T"],
                     .heads = x.size(1),
                     .head_dim = dims["D"],
                     .rotary = 2 * dims["half"],
                     .in_stride = x.stride(0)},
                    here.stream);
    });
    return out;
  };
  return {rotate(q_), rotate(k_)};
}

void kv_append_cuda(const Tensor& k_, const Tensor& v_, const Tensor& cache, const Tensor& slots_) {
  Dims dims("kv_append", at::kCUDA);
  expect_append("kv_append", dims, k_.scalar_type(), k_, v_, cache, slots_);
  const OnDevice here(k_);
  const Tensor k = with_dense_rows(k_), v = with_dense_rows(v_), slots = slots_.contiguous();
  dispatch_float("kv_append", k, [&](auto kind) {
    using T = decltype(kind);
    cuda::kv_append<T>({.k = input<T>(k),
                        .v = input<T>(v),
                        .slots = input<int64_t>(slots),
                        .cache = output<T>(cache),
                        .rows = dims["T"],
                        .kv_heads = dims["KH"],
                        .head_dim = dims["D"],
                        .k_stride = k.stride(0),
                        .v_stride = v.stride(0)},
                       here.stream);
  });
}

Tensor rope_append_cuda(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& cos_, const Tensor& sin_,
                        const Tensor& positions_, const Tensor& cache, const Tensor& slots_) {
  constexpr const char* kOp = "rope_append";
  Dims dims(kOp, at::kCUDA);
  expect_rope(kOp, dims, q_.scalar_type(), q_, k_, cos_, sin_, positions_);
  expect_append(kOp, dims, q_.scalar_type(), k_, v_, cache, slots_);
  const OnDevice here(q_);
  const Tensor q = with_dense_rows(q_), k = with_dense_rows(k_), v = with_dense_rows(v_);
  const Tensor cos = cos_.contiguous(), sin = sin_.contiguous(), positions = positions_.contiguous(), slots = slots_.contiguous();
  const Tensor out = at::empty(q.sizes(), q.options());
  dispatch_float(kOp, q, [&](auto kind) {
    using T = decltype(kind);
    cuda::rope_append<T>({.q = input<T>(q),
                          .k = input<T>(k),
                          .v = input<T>(v),
                          .out = output<T>(out),
                          .cache = output<T>(cache),
                          .cos = input<float>(cos),
                          .sin = input<float>(sin),
                          .positions = input<int32_t>(positions),
                          .slots = input<int64_t>(slots),
                          .rows = dims["T"],
                          .heads = dims["H"],
                          .kv_heads = dims["KH"],
                          .head_dim = dims["D"],
                          .rotary = 2 * dims["half"],
                          .q_stride = q.stride(0),
                          .k_stride = k.stride(0),
                          .v_stride = v.stride(0)},
                         here.stream);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CUDA, m) {
  m.impl("attention", attention_cuda);
  m.impl("attention_backward", attention_backward_cuda);
  m.impl("paged_attention", paged_attention_cuda);
  m.impl("rope", rope_cuda);
  m.impl("kv_append", kv_append_cuda);
  m.impl("rope_append", rope_append_cuda);
}

}  // namespace hybrid
