// Scoring and sampling of rows of logits on a GPU: sampling.h for fp32, fp16 and bf16 logits, on a stream.
#pragma once
#include <cstdint>

#include "sampling/sampling.h"

namespace hybrid::cuda {

// Log-probability of each row's target, entropy and log-sum-exp of logits / temperature, over the logits that reach the row's
// threshold or, where that is less, its target's logit (score_row). A row with NaN, +inf or nothing but -inf scores NaN; a target
// outside the vocabulary has log-probability NaN.
template <typename T>
struct ScoreParams {
  const T* logits;         // [rows, vocab]
  const int64_t* targets;  // [rows]
  const float* thresholds;  // [rows] or nullptr: the whole vocabulary
  float* logprob;          // [rows]
  float* entropy;          // [rows]
  double* lse;             // [rows]
  float* threshold;        // [rows] the one that held
  int64_t rows, vocab;
  float temperature;  // >= kMinTemperature
};
template <typename T>
void token_logprobs(const ScoreParams<T>& params, void* stream);

// The gradient of grad_logprob * logprob + grad_entropy * entropy with respect to the logits.
template <typename T>
struct ScoreBackwardParams {
  const float* grad_logprob;  // [rows]
  const float* grad_entropy;  // [rows]
  const T* logits;            // [rows, vocab]
  const int64_t* targets;     // [rows]
  const float* entropy;       // [rows], as token_logprobs gave it
  const double* lse;          // [rows]
  const float* thresholds;    // [rows] those that held
  T* grad;                    // [rows, vocab]
  int64_t rows, vocab;
  float temperature;
};
template <typename T>
void token_logprobs_backward(const ScoreBackwardParams<T>& params, void* stream);

// One token a row by the races of race.h, with the uniforms that the CPU uses: the same token but where two clocks ring within the
// rounding of a weight. A kept set, too, may differ by a token whose weight is within rounding of what top_p asks.
template <typename T>
struct SampleParams {
  const T* logits;  // [rows, vocab]
  SamplingRule rule;
  const int64_t* sample_ids;  // [rows]
  const int64_t* positions;   // [rows], each below 2^32
  int64_t* token;             // [rows] -1, and NaN below, for a row that is no distribution
  float* logprob;             // [rows]
  float* entropy;             // [rows]
  float* kept_mass;           // [rows]
  float* threshold;           // [rows]
  float* kept_logprob;        // [rows]
  int64_t rows, vocab;
};
template <typename T>
void sample(const SampleParams<T>& params, void* stream);

// The same from at most 16 rows of the head's input, without their logits. Not for truncated draws. The logits are those of the linear
// layer (linear_cuda.h), rounded to T; a row's bits do not depend on the others.
struct HeadBlock {  // 64 tokens of a row, or fewer at its end
  float max, weight, weighted;  // greatest logit; sums relative to it, as BlockStats (row.h) has them
  float logit;                  // of the token that wins among these
  int32_t token;
};
template <typename T>
struct HeadSampleParams {
  const T* x;       // [rows, width]
  const T* weight;  // [vocab, width]
  float temperature;  // 0: the greatest logit, the first of several
  uint64_t seed;
  const int64_t* sample_ids;  // [rows]
  const int64_t* positions;   // [rows]
  HeadBlock* blocks;          // scratch [rows, ceil(vocab / 64)]
  int64_t* token;             // [rows], and what follows: as sample gives them
  float *logprob, *entropy, *kept_mass, *threshold, *kept_logprob;
  int64_t rows, vocab, width;
};
template <typename T>
void sample_skinny_head(const HeadSampleParams<T>& params, void* stream);

}  // namespace hybrid::cuda
