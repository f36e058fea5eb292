// The layer walk: one pass of the decoder over packed rows (prefill chunks, decode rows, or both) against the paged
// cache. It calls the kernels in the order of the training decoder (hybrid_engine/models/decoder.py); as every kernel's
// row result is independent of the other rows, a token gets the same bits here as there. In a tensor-parallel group a rank
// computes its slice of every layer's outputs; what the next layer reads is put together from all of them.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "common/peers.h"
#include "engine/buffer.h"
#include "engine/kv_blocks.h"
#include "engine/slices.h"
#include "engine/spec.h"
#include "engine/weight_gate.h"
#include "engine/weights.h"
#include "sampling/head.h"

namespace hybrid {

// Rows of one pass, sequence after sequence. A sequence's rows are the last of its kv_len positions.
struct Pass {
  struct Sequence {
    int64_t rows, kv_len;
    const std::vector<int32_t>* blocks;  // must outlive the pass
  };
  std::vector<int64_t> tokens;
  std::vector<int32_t> positions;
  std::vector<Sequence> sequences;
  std::vector<int64_t> logit_rows;  // ascending: rows whose next token is wanted

  void clear();
  // Appends `rows` tokens of a sequence whose first `start` tokens are in the cache. The next token is wanted of the
  // last `logits` rows.
  void add(const int64_t* tokens, int64_t start, int64_t rows, const std::vector<int32_t>& blocks, int64_t logits);
  int64_t rows() const { return static_cast<int64_t>(tokens.size()); }
};

class Forward {
 public:
  // All but the numbers must outlive this object. No gate: the weights are all there. No peers: the slices are the whole.
  Forward(const DecoderSpec& spec, const Slices& slices, const ModelWeights& weights, WeightGate* gate, Peers* peers,
          KvArena& cache, int64_t max_rows, int64_t max_logit_rows);

  // Appends the rows to the cache, and keeps the hidden states of the pass's logit rows for draw().
  void run(const Pass& pass);
  // Draws from the distributions after the pass's logit rows [first, first + count); draws[i].row counts from `first`.
  // Each logit row once, and at most max_logit_rows() in a call.
  void draw(int64_t first, int64_t count, const SamplingRule& rule, std::span<const HeadSampler::Draw> draws,
            Sampled* sampled);
  int64_t max_logit_rows() const { return max_logit_rows_; }
  int64_t scratch_bytes() const;  // without what counts as kernel memory
  int64_t sampler_bytes(const SamplingRule& rule) const { return sampler_.declared_bytes(rule); }  // counts as that

 private:
  // Until a part is there, and what it stores as bfloat16 but is read as float is widened.
  void await(int64_t part);
  void find_slots(const Pass& pass);
  void embed(const Pass& pass);
  void block_pre_norm(const Pass& pass, int64_t layer);
  void block_post_norm(const Pass& pass, int64_t layer);
  void attention(const Pass& pass, int64_t layer, const float* x);
  void normalize_heads(const BlockWeights& block, int64_t rows);
  void append(const Pass& pass, float* cache);
  void attend(const Pass& pass, int64_t layer);
  void attend(const Pass& pass, int64_t layer, const HeadSegment& segment);
  void mlp(const BlockWeights& block, const float* x, int64_t rows);
  void gather(const std::vector<int64_t>& logit_rows);
  const float* finish(int64_t first, int64_t count);
  // y [rows, N] of this rank's outputs.
  void linear_layer(const LinearWeights& linear, const float* x, int64_t rows, float* y);
  // The same, of all ranks' outputs, of which this one has those that `begins` says.
  void whole_layer(const LinearWeights& linear, const std::vector<int64_t>& begins, const float* x, int64_t rows,
                   float* y);
  // [rows, begins.back()] of all ranks' columns, of which `mine` has this one's.
  const float* everyones(const float* mine, const std::vector<int64_t>& begins, int64_t rows);
  // y = norm(x + residual), residual += x; without a residual y = norm(x).
  void norm(const NormWeights& weights, float* x, float* residual, float* y, int64_t rows);

  const DecoderSpec& spec_;
  const Slices& slices_;
  const ModelWeights& weights_;
  WeightGate* gate_;
  Peers* peers_;
  KvArena& cache_;
  const std::vector<HeadSegment> segments_;
  const std::vector<int64_t> attended_begins_, block_begins_;  // columns of all heads' outputs; blocks of the vocabulary
  // Of this rank: query heads, key-value heads, and the widths of what they and the MLP read and write.
  const int64_t heads_, kv_heads_, q_size_, kv_size_, qkv_size_, inner_;
  std::vector<int64_t> slots_;  // where each row's key and value go, in any layer
  // [max_rows, ...]. hidden_ is the residual stream, delta_ what the last attention or MLP adds to it (not yet added).
  FloatBuffer hidden_, delta_, normed_, embedded_, qkv_, attended_, mlp_in_, activated_, low_rank_;
  FloatBuffer part_, whole_;  // this rank's outputs of a layer; all ranks' inputs of the next
  std::vector<int32_t> owners_;  // of each row's embedding
  std::vector<bool> widened_;    // of each part: since it came to stay
  HeadSampler sampler_;
  int64_t max_logit_rows_;
};

}  // namespace hybrid
