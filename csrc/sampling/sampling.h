// One row of logits to one token, with the log-probability that training will recompute.
#pragma once
#include <cstdint>

namespace hybrid {

// Temperatures below this (other than 0) would overflow logits / temperature.
inline constexpr float kMinTemperature = 1e-6f;

// Log-probability of `target`, entropy and log-sum-exp of logits / temperature over the logits that reach a threshold:
// -inf takes the whole vocabulary. A target below the threshold lowers it to its own logit, so that it is always one of
// them. The one row function of sampling and training: equal logits give equal bits. -inf marks an impossible token; a row
// with NaN, +inf or nothing but -inf scores NaN. temperature >= kMinTemperature.
struct RowScore {
  float logprob, entropy;
  float threshold;  // the one that held
  double lse;       // in double, so that the backward pass can form probabilities to float precision from it
};
RowScore score_row(const float* logits, int64_t vocab, int64_t target, float temperature, float threshold);

struct SamplingRule {
  float temperature;  // 0 takes the argmax (lowest index on ties); its log-probability is reported at temperature 1
  int64_t top_k;      // 0 keeps all
  float top_p;        // 1 keeps all; the smallest set of most likely tokens with at least this mass of what top-k left
  uint64_t seed;
};
// Order: temperature, top-k, top-p. A kept set is every logit at or above a threshold, so a tie at the threshold is
// kept whole.
struct Sampled {
  int64_t token;       // -1 (and NaN below) where a logit is NaN or +inf, or all are -inf
  float logprob;       // over the whole vocabulary at `temperature`, before truncation
  float entropy;       // of the same distribution
  float kept_mass;     // probability of the set that top-k and top-p kept; 1 without them or when greedy
  float threshold;     // least logit kept; -inf without them or when greedy. Kept set = {logit >= threshold}
  float kept_logprob;  // over the kept set: what score_row(..., threshold) gives. `logprob` without truncation
};
// An exact draw by races of exponential clocks (race.h), whose Philox uniforms are keyed by (seed, sample, position) and
// the token or its block of 64: distributions that differ little give the same token more often than not.
Sampled sample_row(const float* logits, int64_t vocab, const SamplingRule& rule, uint64_t sample, uint32_t position);

}  // namespace hybrid
