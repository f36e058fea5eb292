// Causal attention with grouped-query heads. One tile size and one online-softmax order serve training, prefill and decode,
// so a token's output has the same bits in all three.
#pragma once
#include <cstdint>

namespace hybrid {

constexpr int64_t kKvTile = 64;  // tokens in one KV block and in one softmax tile; tiles start at absolute positions

// Where a sequence's keys and values lie. Tile j holds tokens [64 j, 64 j + 64): token t of head h is at
// k[t / 64] + h * head_stride + (t % 64) * token_stride. Packed training tensors and paged caches differ only in this.
struct KvTiles {
  const float* const* k;
  const float* const* v;
  int64_t head_stride;
  int64_t token_stride;
};

struct AttentionSequence {
  const float* q;    // [q_rows, H, D], row stride q_stride: the last q_rows of the kv_len positions
  float* out;        // [q_rows, H, D], row stride out_stride
  float* lse;        // [H, lse_stride] log-sum-exp of the scaled scores, this sequence's first column; or nullptr
  int64_t q_rows;
  int64_t kv_len;
  KvTiles kv;
};

struct AttentionArgs {
  const AttentionSequence* sequences;
  int64_t num_sequences;
  int64_t heads, kv_heads, head_dim;
  int64_t q_stride, out_stride, lse_stride;
  float scale;
  const float* alibi_slopes;  // [H] or nullptr
  int64_t window;             // keys visible to a query, itself included; 0 means all
};
void attention_forward(const AttentionArgs& args);

// Gradients of attention_forward over packed sequences that start at position 0. Probabilities are computed again from lse.
struct AttentionBackwardArgs {
  const float* q;         // [T, H, D], row stride q_stride
  const float* k;         // [T, KH, D], row stride kv_stride
  const float* v;         // [T, KH, D], row stride kv_stride
  const float* out;       // [T, H, D] contiguous, as are all below
  const float* grad_out;  // [T, H, D]
  const float* lse;       // [H, T]
  float* grad_q;          // [T, H, D]
  float* grad_k;          // [T, KH, D]
  float* grad_v;          // [T, KH, D]
  const int32_t* cu_seqlens;  // [num_sequences + 1]
  int64_t num_sequences, tokens;
  int64_t heads, kv_heads, head_dim;
  int64_t q_stride, kv_stride;
  float scale;
  const float* alibi_slopes;  // [H] or nullptr
  int64_t window;
};
void attention_backward(const AttentionBackwardArgs& args);

// Rotary embedding, half-split convention (as transformers): rotates the first rotary_dim of each head.
// out may alias in.
struct RopeArgs {
  const float* in;     // [rows, heads, D], row stride in_stride
  float* out;          // [rows, heads, D], row stride out_stride
  int64_t in_stride, out_stride;
  int64_t rows, heads, head_dim, rotary_dim;
  const float* cos;    // [max_positions, rotary_dim / 2]
  const float* sin;
  const int32_t* positions;  // [rows]
};
void rope(const RopeArgs& args);

// The paged cache: [num_blocks][KH][K: 64 x D | V: 64 x D], float. slot = block * 64 + offset.
struct KvCacheLayout {
  int64_t kv_heads, head_dim;
  int64_t head_stride() const { return 2 * kKvTile * head_dim; }
  int64_t block_stride() const { return kv_heads * head_stride(); }
  int64_t v_offset() const { return kKvTile * head_dim; }
};
void kv_append(const float* k, const float* v, int64_t row_stride, int64_t rows, const int64_t* slots,
               const KvCacheLayout& layout, float* cache);

// Both in one pass, with their bits: turned queries to query.out, turned keys and the values to their slots.
struct RopeAppendArgs {
  RopeArgs query;        // its tables, positions, rows and head size are the keys' too
  const float* k;        // [rows, KH, D], row stride k_stride
  const float* v;        // [rows, KH, D], row stride v_stride
  int64_t k_stride, v_stride;
  const int64_t* slots;  // [rows]
  KvCacheLayout layout;
  float* cache;
};
void rope_append(const RopeAppendArgs& args);

}  // namespace hybrid
