// Generation's attention on a GPU: the contracts of attention.h for fp32, fp16 and bf16, on a stream.
#pragma once
#include <cstdint>

#include "attention/attention.h"

namespace hybrid::cuda {

constexpr int64_t kAttentionChunk = 4 * kKvTile;  // keys that a block takes: chunks begin at absolute positions
constexpr int kChunkTiles = static_cast<int>(kAttentionChunk / kKvTile);

// Causal attention of the last rows of each sequence over its whole cache. Lengths and tables are read on the device alone, so that
// a recorded launch serves every step. A row's bits depend on its sequence and position, not on the batch or on other rows. Chunks that
// neighbouring sequences have in the same blocks, as samples of one prompt do, are read once for as many rows as fit a tile.
template <typename T>
struct PagedAttentionParams {
  const T* q;                   // [rows, heads, head_dim], row stride q_stride: sequence b owns rows cu_q[b] .. cu_q[b + 1]
  const T* cache;               // [blocks, kv_heads, 2, 64, head_dim] (KvCacheLayout)
  const int32_t* block_tables;  // [batch, max_blocks]
  const int32_t* kv_lengths;    // [batch]
  const int32_t* cu_q;          // [batch + 1]
  const float* alibi_slopes;    // [heads] or nullptr
  T* out;                       // [rows, heads, head_dim]
  float* lse;                   // [heads, rows] log-sum-exp of the scaled scores
  float* partial;               // scratch [rows, heads, attention_chunks(max_blocks), head_dim + 2]
  int64_t rows, batch, heads, kv_heads, head_dim, max_blocks, q_stride;
  int64_t window;               // keys visible to a query, itself included; 0 means all
  float scale;
};
template <typename T>
void paged_attention(const PagedAttentionParams<T>& params, void* stream);

constexpr int64_t attention_chunks(int64_t max_blocks) {
  return (max_blocks * kKvTile + kAttentionChunk - 1) / kAttentionChunk;
}

// The same for many rows a sequence, over packed keys and values or the paged cache: the same bits. 16-bit types: head_dim at most
// kFlashHeadDim.
constexpr int64_t kFlashHeadDim = 256;
template <typename T>
struct FlashAttentionParams {
  const T* q;               // [rows, heads, head_dim], row stride q_stride
  const T* k;               // [rows, kv_heads, head_dim], row stride k_stride; or the cache
  const T* v;               // like k, row stride v_stride; the cache holds them too
  const int32_t* block_tables;  // [batch, max_blocks], or nullptr: packed
  const int32_t* kv_lengths;    // [batch], or nullptr: as many keys as rows
  const int32_t* cu_q;          // [batch + 1]
  const float* alibi_slopes;    // [heads] or nullptr
  T* out;                   // [rows, heads, head_dim]
  float* lse;               // [heads, rows]
  int64_t rows, batch, heads, kv_heads, head_dim, max_blocks;
  int64_t q_stride, k_stride, v_stride;
  int64_t window;           // as above
  float scale;
  bool aligned = false;     // set by flash_attention: all rows may be read 16 bytes at a time
};
template <typename T>
void flash_attention(FlashAttentionParams<T> params, void* stream);

// Gradients of the above over packed sequences. The same bits on every run; probabilities are computed again from lse. 16-bit types:
// head_dim at most kFlashHeadDim.
template <typename T>
struct AttentionBackwardParams {
  const T* q;                 // [tokens, heads, head_dim], row stride q_stride
  const T* k;                 // [tokens, kv_heads, head_dim], row stride kv_stride, like v
  const T* v;
  const T* out;               // [tokens, heads, head_dim] contiguous, as are all below
  const T* grad_out;
  const float* lse;           // [heads, tokens]
  float* delta;               // scratch [heads, tokens]
  T* grad_q;                  // [tokens, heads, head_dim]
  T* grad_k;                  // [tokens, kv_heads, head_dim]
  T* grad_v;
  const int32_t* cu_seqlens;  // [batch + 1]
  const float* alibi_slopes;  // [heads] or nullptr
  int64_t tokens, batch, heads, kv_heads, head_dim;
  int64_t q_stride, kv_stride;
  int64_t window;
  float scale;
  bool aligned = false;       // set by attention_backward
};
template <typename T>
void attention_backward(AttentionBackwardParams<T> params, void* stream);

// Rotary embedding, half-split: pairs (i, i + rotary / 2) of each head turn by the angle whose cosine and sine are given.
template <typename T>
struct RopeParams {
  const T* in;     // [rows, heads, head_dim], row stride in_stride
  T* out;          // [rows, heads, head_dim]; may alias in
  const float* cos;  // [positions, rotary / 2]
  const float* sin;
  const int32_t* positions;  // [rows]
  int64_t rows, heads, head_dim, rotary, in_stride;
};
template <typename T>
void rope(const RopeParams<T>& params, void* stream);

template <typename T>
struct KvAppendParams {
  const T* k;  // [rows, kv_heads, head_dim], row stride k_stride
  const T* v;  // like k, row stride v_stride
  const int64_t* slots;  // [rows] block * 64 + offset
  T* cache;              // [blocks, kv_heads, 2, 64, head_dim]
  int64_t rows, kv_heads, head_dim, k_stride, v_stride;
};
template <typename T>
void kv_append(const KvAppendParams<T>& params, void* stream);

// Both in one launch, which is what they cost in decode: turned queries to `out`, turned keys and the values to their slots. The
// same bits as rope and kv_append.
template <typename T>
struct RopeAppendParams {
  const T* q;  // [rows, heads, head_dim], row stride q_stride
  const T* k;  // [rows, kv_heads, head_dim], row stride k_stride
  const T* v;  // like k, row stride v_stride
  T* out;      // [rows, heads, head_dim]
  T* cache;    // [blocks, kv_heads, 2, 64, head_dim]
  const float* cos;  // [positions, rotary / 2]
  const float* sin;
  const int32_t* positions;  // [rows]
  const int64_t* slots;      // [rows]
  int64_t rows, heads, kv_heads, head_dim, rotary;
  int64_t q_stride, k_stride, v_stride;
};
template <typename T>
void rope_append(const RopeAppendParams<T>& params, void* stream);

}  // namespace hybrid::cuda
