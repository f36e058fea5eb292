// One row of logits to one token, with the log-probability that training will recompute.
#pragma once
#include <cstdint>

namespace hybrid {

// Log-probability of `target`, entropy and log-sum-exp of logits / temperature over the whole vocabulary.
// The one row function of sampling and training: equal logits give equal bits.
struct RowScore {
  float logprob, entropy, lse;
};
RowScore score_row(const float* logits, int64_t vocab, int64_t target, float temperature);

struct SamplingRule {
  float temperature;  // 0 takes the argmax (lowest index on ties); its log-probability is reported at temperature 1
  int64_t top_k;      // 0 keeps all
  float top_p;        // 1 keeps all; the smallest set of most likely tokens with at least this mass
  uint64_t seed;
};
struct Sampled {
  int64_t token;
  float logprob;    // over the whole vocabulary at `temperature`, before truncation
  float entropy;    // of the same distribution
  float kept_mass;  // probability of the set that top-k and top-p kept; 1 without them
  float threshold;  // least logit kept; -inf without them. Kept set = {logit >= threshold}
};
// An exact draw by inverse transform from one Philox uniform keyed by (seed, sample, position).
Sampled sample_row(const float* logits, int64_t vocab, const SamplingRule& rule, uint64_t sample, uint32_t position);

}  // namespace hybrid
