#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "attention/attention.h"
#include "attention/attention_checks.h"
#include "common/dims.h"

namespace hybrid {
namespace {

using at::Tensor;

const float* data(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr; }

// Keys and values with one row stride.
std::pair<Tensor, Tensor> with_equal_rows(const Tensor& k_, const Tensor& v_) {
  const Tensor k = with_dense_rows(k_), v = with_dense_rows(v_);
  if (k.stride(0) == v.stride(0)) return {k, v};
  return {k.contiguous(), v.contiguous()};
}

void check_heads(const char* op, const Dims& dims) {
  const int64_t heads = dims["H"], kv_heads = dims["KH"];
  TORCH_CHECK_VALUE(kv_heads > 0 && heads % kv_heads == 0, op, ": ", heads, " query heads over ", kv_heads,
                    " key/value heads; expected a multiple");
}

void check_window(const char* op, int64_t window) {
  TORCH_CHECK_VALUE(window >= 0, op, ": window is ", window, "; expected a number of keys, or 0 for all");
}

// Row offsets of packed sequences: 0 first, never falling, the number of rows last.
void check_offsets(const char* op, const char* name, const Tensor& offsets, int64_t rows) {
  const int32_t* at = offsets.const_data_ptr<int32_t>();
  const int64_t last = offsets.size(0) - 1;
  TORCH_CHECK_VALUE(last >= 0 && at[0] == 0 && at[last] == rows, op, ": ", name, " must run from 0 to the number of rows, ", rows);
  for (int64_t i = 0; i < last; ++i) {
    TORCH_CHECK_VALUE(at[i] <= at[i + 1], op, ": ", name, " falls from ", at[i], " to ", at[i + 1], " at entry ", i + 1);
  }
}

// Shared by the packed and the paged operator: everything but the sequences.
struct Forward {
  Tensor q, alibi_slopes, out, lse;
  AttentionArgs args;

  Forward(const Dims& dims, const Tensor& q_, double scale, const std::optional<Tensor>& alibi_slopes_, int64_t window) {
    const int64_t heads = dims["H"], dim = dims["D"], tokens = dims["T"];
    q = with_dense_rows(q_);
    if (alibi_slopes_) alibi_slopes = alibi_slopes_->contiguous();
    out = at::empty({tokens, heads, dim}, q.options());
    lse = at::empty({heads, tokens}, q.options());
    args = {};
    args.heads = heads;
    args.kv_heads = dims["KH"];
    args.head_dim = dim;
    args.q_stride = q.stride(0);
    args.out_stride = heads * dim;
    args.lse_stride = tokens;
    args.scale = static_cast<float>(scale);
    args.alibi_slopes = data(alibi_slopes);
    args.window = window;
  }

  AttentionSequence sequence(int64_t first_row, int64_t rows, int64_t kv_len, const KvTiles& kv) const {
    return {data(q) + first_row * args.q_stride, out.mutable_data_ptr<float>() + first_row * args.out_stride,
            lse.mutable_data_ptr<float>() + first_row, rows, kv_len, kv};
  }

  std::tuple<Tensor, Tensor> run(const std::vector<AttentionSequence>& sequences) {
    args.sequences = sequences.data();
    args.num_sequences = static_cast<int64_t>(sequences.size());
    attention_forward(args);
    return {out, lse};
  }
};

Dims packed_dims(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                 const std::optional<Tensor>& alibi_slopes, int64_t window) {
  Dims dims(op);
  dims.expect(q, "q", {"T", "H", "D"})
      .expect(k, "k", {"T", "KH", "D"})
      .expect(v, "v", {"T", "KH", "D"})
      .expect(cu_seqlens, "cu_seqlens", {"B+1"}, at::kInt)
      .expect(alibi_slopes, "alibi_slopes", {"H"});
  check_heads(op, dims);
  check_window(op, window);
  return dims;
}

std::tuple<Tensor, Tensor> attention_cpu(const Tensor& q, const Tensor& k_, const Tensor& v_, const Tensor& cu_seqlens_,
                                         double scale, const std::optional<Tensor>& alibi_slopes, int64_t window) {
  const Dims dims = packed_dims("attention", q, k_, v_, cu_seqlens_, alibi_slopes, window);
  const Tensor cu_seqlens = cu_seqlens_.contiguous();
  check_offsets("attention", "cu_seqlens", cu_seqlens, dims["T"]);
  const auto [k, v] = with_equal_rows(k_, v_);
  Forward forward(dims, q, scale, alibi_slopes, window);

  const int32_t* starts = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t batch = dims["B+1"] - 1;
  std::vector<const float*> k_tiles, v_tiles;
  k_tiles.reserve(dims["T"] / kKvTile + batch);  // at most this many, so that the pointers below stay
  v_tiles.reserve(dims["T"] / kKvTile + batch);
  std::vector<AttentionSequence> sequences;
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t start = starts[i], length = starts[i + 1] - start;
    const KvTiles kv{k_tiles.data() + k_tiles.size(), v_tiles.data() + v_tiles.size(), dims["D"], k.stride(0)};
    for (int64_t token = 0; token < length; token += kKvTile) {
      k_tiles.push_back(data(k) + (start + token) * k.stride(0));
      v_tiles.push_back(data(v) + (start + token) * v.stride(0));
    }
    sequences.push_back(forward.sequence(start, length, length, kv));
  }
  return forward.run(sequences);
}

std::tuple<Tensor, Tensor> paged_attention_cpu(const Tensor& q, const Tensor& cache_, const Tensor& block_tables_,
                                               const Tensor& kv_lengths_, const Tensor& cu_q_, double scale,
                                               const std::optional<Tensor>& alibi_slopes, int64_t window) {
  constexpr const char* kOp = "paged_attention";
  Dims dims(kOp);
  dims.expect(q, "q", {"T", "H", "D"})
      .expect(cache_, "cache", {"blocks", "KH", "2", "64", "D"})
      .expect(block_tables_, "block_tables", {"B", "max_blocks"}, at::kInt)
      .expect(kv_lengths_, "kv_lengths", {"B"}, at::kInt)
      .bind("B+1", dims["B"] + 1, "block_tables")
      .expect(cu_q_, "cu_q", {"B+1"}, at::kInt)
      .expect(alibi_slopes, "alibi_slopes", {"H"});
  check_heads(kOp, dims);
  check_window(kOp, window);
  const Tensor cache = cache_.contiguous(), block_tables = block_tables_.contiguous(), kv_lengths = kv_lengths_.contiguous(),
               cu_q = cu_q_.contiguous();
  check_offsets(kOp, "cu_q", cu_q, dims["T"]);
  Forward forward(dims, q, scale, alibi_slopes, window);

  const KvCacheLayout layout{dims["KH"], dims["D"]};
  const int64_t max_blocks = dims["max_blocks"], batch = dims["B"];
  const int32_t *starts = cu_q.const_data_ptr<int32_t>(), *lengths = kv_lengths.const_data_ptr<int32_t>();
  std::vector<const float*> k_tiles(batch * max_blocks), v_tiles(batch * max_blocks);
  std::vector<AttentionSequence> sequences;
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t rows = starts[i + 1] - starts[i], length = lengths[i];
    TORCH_CHECK_VALUE(rows <= length && length <= max_blocks * kKvTile, kOp, ": sequence ", i, " has ", rows,
                      " query rows and kv_length ", length, "; expected rows <= kv_length <= ", max_blocks * kKvTile,
                      " (", max_blocks, " blocks of ", kKvTile, ")");
    const int64_t first_tile = i * max_blocks;
    for (int64_t tile = first_tile; (tile - first_tile) * kKvTile < length; ++tile) {
      const int64_t block = block_tables.const_data_ptr<int32_t>()[tile];
      TORCH_CHECK_VALUE(block >= 0 && block < dims["blocks"], kOp, ": block_tables[", i, ", ", tile - first_tile, "] is ",
                        block, "; the cache has ", dims["blocks"], " blocks");
      k_tiles[tile] = data(cache) + block * layout.block_stride();
      v_tiles[tile] = k_tiles[tile] + layout.v_offset();
    }
    const KvTiles kv{k_tiles.data() + first_tile, v_tiles.data() + first_tile, layout.head_stride(), dims["D"]};
    sequences.push_back(forward.sequence(starts[i], rows, length, kv));
  }
  return forward.run(sequences);
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_cpu(const Tensor& grad_out_, const Tensor& q_, const Tensor& k_,
                                                          const Tensor& v_, const Tensor& out_, const Tensor& lse_,
                                                          const Tensor& cu_seqlens_, double scale,
                                                          const std::optional<Tensor>& alibi_slopes_, int64_t window) {
  constexpr const char* kOp = "attention_backward";
  Dims dims = packed_dims(kOp, q_, k_, v_, cu_seqlens_, alibi_slopes_, window);
  dims.expect(grad_out_, "grad_out", {"T", "H", "D"}).expect(out_, "out", {"T", "H", "D"}).expect(lse_, "lse", {"H", "T"});
  const Tensor grad_out = grad_out_.contiguous(), out = out_.contiguous(), lse = lse_.contiguous();
  const Tensor cu_seqlens = cu_seqlens_.contiguous(), alibi_slopes = alibi_slopes_ ? alibi_slopes_->contiguous() : Tensor();
  check_offsets(kOp, "cu_seqlens", cu_seqlens, dims["T"]);
  const Tensor q = with_dense_rows(q_);
  const auto [k, v] = with_equal_rows(k_, v_);
  const Tensor grad_q = at::empty({dims["T"], dims["H"], dims["D"]}, q.options());
  const Tensor grad_k = at::empty({dims["T"], dims["KH"], dims["D"]}, q.options());
  const Tensor grad_v = at::empty({dims["T"], dims["KH"], dims["D"]}, q.options());
  attention_backward({.q = data(q),
                      .k = data(k),
                      .v = data(v),
                      .out = data(out),
                      .grad_out = data(grad_out),
                      .lse = data(lse),
                      .grad_q = grad_q.mutable_data_ptr<float>(),
                      .grad_k = grad_k.mutable_data_ptr<float>(),
                      .grad_v = grad_v.mutable_data_ptr<float>(),
                      .cu_seqlens = cu_seqlens.const_data_ptr<int32_t>(),
                      .num_sequences = dims["B+1"] - 1,
                      .tokens = dims["T"],
                      .heads = dims["H"],
                      .kv_heads = dims["KH"],
                      .head_dim = dims["D"],
                      .q_stride = q.stride(0),
                      .kv_stride = k.stride(0),
                      .scale = static_cast<float>(scale),
                      .alibi_slopes = data(alibi_slopes),
                      .window = window});
  return {grad_q, grad_k, grad_v};
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CPU, m) {
  m.impl("attention", attention_cpu);
  m.impl("attention_backward", attention_backward_cpu);
  m.impl("paged_attention", paged_attention_cpu);
}

}  // namespace hybrid
