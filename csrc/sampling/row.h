// What scoring, sampling and the backward pass compute over one row of logits, block by block.
// Internal to csrc/sampling.
//
// A row is cut into blocks of 64 logits, and a block is known by three floats: its maximum m_b, and over its logits x the
// sums of exp((x - m_b) / temperature) and of the same times (x - m_b) / temperature. They depend on the block alone. So a
// row may be reduced while its logits pass through the cache, in any order and by any number of threads: the few floats
// that stay are added up in double, in the order of the vocabulary, and give the same bits every time.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace hybrid {

inline constexpr int64_t kRowBlock = 64;
inline int64_t row_blocks(int64_t vocab) { return (vocab + kRowBlock - 1) / kRowBlock; }
inline int64_t block_size(int64_t block, int64_t vocab) {
  const int64_t left = vocab - block * kRowBlock;
  return left < kRowBlock ? left : kRowBlock;
}

// The blocks of one row, or of a stretch of it.
struct BlockStats {
  float* max;       // [blocks]; -inf where every logit is
  float* weight;    // [blocks] sum of exp((x - m_b) / temperature); NaN where a logit is NaN or +inf
  float* weighted;  // [blocks] sum of exp((x - m_b) / temperature) * (x - m_b) / temperature

  BlockStats from(int64_t block) const { return {max + block, weight + block, weighted + block}; }
};

// Statistics of logits[0 .. count), a stretch that begins with a block. Logits below `threshold` weigh nothing: -inf takes
// them all. `max` is that of the block, unless nothing in it reaches the threshold, when the sums are 0.
void block_stats(const float* logits, int64_t count, float temperature, float threshold, const BlockStats& stats);

// weights[0 .. count) of exp((logits - max) / temperature); count <= kRowBlock. With a block's maximum: the very values
// that its statistics add up.
void block_weights(const float* logits, int64_t count, float max, float temperature, float* weights);

// The whole row, relative to its greatest logit m: S = sum of exp((x - m) / temperature).
struct RowTotals {
  float max;        // m
  double weight;    // S. NaN where a logit is NaN or +inf; 0 where all are -inf
  double weighted;  // sum of exp((x - m) / temperature) * (x - m) / temperature

  bool is_distribution() const;  // S is positive and finite
  double log_sum_exp(float temperature) const;
  double entropy() const;
  // In double from the exact logit: one rounding, on top of the error of log S.
  double logprob(float logit, float temperature) const;
};
RowTotals total_row(const BlockStats& stats, int64_t blocks, float temperature);

// exp((block_max - row_max) / temperature): what turns a block's sums into the row's.
double block_scale(float block_max, float row_max, float temperature);

// The gradient of grad_logprob * logprob(target) + grad_entropy * entropy with respect to the logits, over the logits that
// reach `threshold`; the target is one of them.
struct RowGradArgs {
  const float* logits;  // [vocab]
  float* grad;          // [vocab]
  int64_t vocab, target;
  float temperature, threshold;
  float entropy;  // as the forward returned them
  double lse;
  float grad_logprob, grad_entropy;
};
void score_row_backward(const RowGradArgs& args);

}  // namespace hybrid
