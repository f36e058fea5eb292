// From the statistics of a row's blocks to a score or a token. Internal to csrc/sampling.
//
// A draw has to see the logits of few blocks: one of them without truncation, those that may hold a kept token with it. It
// names them and is handed their logits, so that it does not matter whether a row lies in memory or is computed again.
#pragma once
#include <cstdint>
#include <limits>
#include <span>

#include "common/kernel_memory.h"
#include "sampling/race.h"
#include "sampling/row.h"
#include "sampling/sampling.h"
#include "sampling/threshold.h"

namespace hybrid {

inline constexpr float kKeepAll = -std::numeric_limits<float>::infinity();

inline float effective_temperature(const SamplingRule& rule) {
  return rule.temperature == 0.0f ? 1.0f : rule.temperature;
}

inline bool cuts_by_count(const SamplingRule& rule, int64_t vocab) { return rule.top_k > 0 && rule.top_k < vocab; }
// Whether a draw may leave tokens out.
inline bool truncates(const SamplingRule& rule, int64_t vocab) {
  return rule.temperature != 0.0f && (cuts_by_count(rule, vocab) || rule.top_p < 1.0f);
}

// `stats` are those of the logits that reach `threshold`, the target's among them.
RowScore score_from(const BlockStats& stats, int64_t vocab, float target_logit, float temperature, float threshold);

class TokenDraw {
 public:
  // `stats` are those of the whole row at effective_temperature(rule), and must live until finish().
  void plan(const BlockStats& stats, int64_t vocab, const SamplingRule& rule, const RaceUniforms& uniforms);

  // The blocks that finish() has to see, ascending. None where the row is no distribution.
  std::span<const int32_t> blocks() const { return blocks_; }

  // logits[i]: those of blocks()[i].
  Sampled finish(const float* const* logits);

 private:
  struct Kept {
    std::span<Candidate> tokens;  // in the order of the vocabulary
    double weight;                // as their own weights add up
    float threshold;
  };

  bool greedy() const { return rule_.temperature == 0.0f; }
  int64_t plan_greedy() const;
  int64_t race_of_blocks();
  void plan_candidates();
  float top_k_bound() const;
  float top_p_bound() const;
  Sampled finish_token(const float* logits);
  Sampled finish_candidates(const float* const* logits);
  Candidate race_of_candidates(std::span<const Candidate> kept);
  std::span<Candidate> gather(const float* const* logits) const;
  Kept truncate(std::span<Candidate> candidates) const;
  RowTotals kept_totals(const float* const* logits, float threshold) const;
  Sampled sampled(int64_t token, float logit, const RowTotals& kept, float threshold) const;

  BlockStats stats_{};
  int64_t vocab_ = 0;
  SamplingRule rule_{};
  RaceUniforms uniforms_;
  RowTotals row_{};
  KernelVector<int32_t> blocks_;
  float bound_ = 0.0f;  // of a truncated draw: no kept logit is below
};

}  // namespace hybrid
