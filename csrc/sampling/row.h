// What scoring, sampling and the backward pass compute over one row of logits, block by block.
// Internal to csrc/sampling. With m the row's greatest logit, the weight of a logit x is exp((x - m) / temperature).
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace hybrid {

// A row is cut into blocks of 64 logits. Each block is folded in float onto the lanes of one vector, and the lanes are
// summed over the blocks in double: two to four roundings in float, in one order, so that a row's bits depend on its
// logits alone.
inline constexpr int64_t kRowBlock = 64;
inline int64_t row_blocks(int64_t vocab) { return (vocab + kRowBlock - 1) / kRowBlock; }

struct RowShift {
  float max;          // m
  float temperature;  // > 0
};

struct RowSums {
  double weight;    // sum of weights, S
  double weighted;  // sum of weight * (x - m) / temperature
};

// maxima[row_blocks(vocab)]: each block's greatest logit. Returns the row's.
float block_maxima(const float* logits, int64_t vocab, float* maxima);

// sums[row_blocks(vocab)], if not nullptr, receives each block's weight in float; the totals do not depend on it.
// A NaN anywhere, +inf, or nothing but -inf makes the totals NaN.
RowSums weight_sums(const float* logits, int64_t vocab, RowShift shift, float* sums);

// weights[0 .. count): the very values that weight_sums adds up. count <= kRowBlock.
void block_weights(const float* logits, int64_t count, RowShift shift, float* weights);

// The gradient of grad_logprob * logprob(target) + grad_entropy * entropy with respect to the logits.
struct RowGradArgs {
  const float* logits;  // [vocab]
  float* grad;          // [vocab]
  int64_t vocab, target;
  float temperature;
  float entropy;  // as score_row returned them
  double lse;
  float grad_logprob, grad_entropy;
};
void score_row_backward(const RowGradArgs& args);

}  // namespace hybrid
