#include "sampling/sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "common/philox.h"
#include "sampling/row.h"
#include "sampling/threshold.h"

namespace hybrid {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Buffers of one thread, grown to the largest vocabulary seen: sampling a token allocates nothing after the first.
struct Scratch {
  std::vector<float> maxima;
  std::vector<double> sums;
  std::vector<float> order;
  std::vector<Candidate> candidates;
};

Scratch& scratch_for(int64_t vocab) {
  thread_local Scratch scratch;
  scratch.maxima.resize(row_blocks(vocab));
  scratch.sums.resize(row_blocks(vocab));
  return scratch;
}

// The log-probability is formed in double from the exact logits: one rounding, on top of the error of log S.
RowScore finish_score(float target_logit, RowShift shift, RowSums sums) {
  const double log_sum = std::log(sums.weight);
  const double target = (static_cast<double>(target_logit) - shift.max) / shift.temperature;
  const double entropy = log_sum - sums.weighted / sums.weight;
  return {static_cast<float>(target - log_sum), static_cast<float>(entropy < 0.0 ? 0.0 : entropy),
          static_cast<float>(shift.max / static_cast<double>(shift.temperature) + log_sum)};
}

// Index of the first token at which the running sum of weights exceeds `aim`; the last one of positive weight when rounding
// leaves the sum short.
template <typename WeightAt>
int64_t first_exceeding(int64_t count, double aim, const WeightAt& weight_at) {
  double sum = 0.0;
  int64_t last = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double weight = weight_at(i);
    if (weight <= 0.0) continue;
    last = i;
    sum += weight;
    if (sum > aim) break;
  }
  return last;
}

// The whole vocabulary: find the block from the block sums, then the token within it.
int64_t draw_from_all(const float* logits, int64_t vocab, RowShift shift, const std::vector<double>& sums, double aim) {
  const int64_t block = first_exceeding(row_blocks(vocab), aim, [&](int64_t b) { return sums[b]; });
  double before = 0.0;
  for (int64_t b = 0; b < block; ++b) before += sums[b];
  const int64_t begin = block * kRowBlock, count = std::min(kRowBlock, vocab - begin);
  float weights[kRowBlock];
  block_weights(logits + begin, count, shift, weights);
  return begin + first_exceeding(count, aim - before, [&](int64_t i) { return static_cast<double>(weights[i]); });
}

int64_t draw_from_candidates(const std::vector<Candidate>& kept, double aim) {
  const auto count = static_cast<int64_t>(kept.size());
  return kept[first_exceeding(count, aim, [&](int64_t i) { return static_cast<double>(kept[i].weight); })].token;
}

// A logit that the k-th greatest one cannot be below: k blocks hold at least one logit as great as the k-th block maximum.
float top_k_bound(Scratch& scratch, int64_t top_k) {
  scratch.order = scratch.maxima;
  if (top_k > static_cast<int64_t>(scratch.order.size())) return -kInfinity;
  const auto kth = scratch.order.begin() + (top_k - 1);
  std::nth_element(scratch.order.begin(), kth, scratch.order.end(), std::greater<>());
  return *kth;
}

// A logit below which all the vocabulary together weighs at most (1 - top_p) S, so that the nucleus needs none of it: V tokens
// of weight (1 - top_p) S / V. The margin covers the rounding of the logarithm.
float top_p_bound(RowShift shift, double total, int64_t vocab, float top_p) {
  const double log_weight = std::log((1.0 - top_p) * total / static_cast<double>(vocab));
  const double bound = shift.max + shift.temperature * (log_weight - 1e-3);
  return static_cast<float>(std::min<double>(bound, shift.max));
}

// Every token whose logit is at least `bound`, in vocabulary order.
void gather_candidates(const float* logits, int64_t vocab, RowShift shift, float bound, Scratch& scratch) {
  scratch.candidates.clear();
  for (int64_t b = 0; b < row_blocks(vocab); ++b) {
    if (scratch.maxima[b] < bound) continue;
    const int64_t begin = b * kRowBlock, count = std::min(kRowBlock, vocab - begin);
    float weights[kRowBlock];
    block_weights(logits + begin, count, shift, weights);
    for (int64_t i = 0; i < count; ++i) {
      if (logits[begin + i] < bound) continue;
      scratch.candidates.push_back({static_cast<int32_t>(begin + i), ordered_key(logits[begin + i]), weights[i]});
    }
  }
}

// Drops the candidates below `key`; returns the weight of the others.
double keep_from(std::vector<Candidate>& candidates, uint32_t key) {
  std::erase_if(candidates, [key](const Candidate& c) { return c.key < key; });
  double weight = 0.0;
  for (const Candidate& c : candidates) weight += c.weight;
  return weight;
}

struct Kept {
  double weight;
  float threshold;
};

// Leaves in scratch.candidates the tokens that top-k, then top-p of what top-k left, keep.
Kept truncate(const float* logits, int64_t vocab, const SamplingRule& rule, RowShift shift, double total,
              Scratch& scratch) {
  std::vector<Candidate>& candidates = scratch.candidates;
  const bool by_count = rule.top_k > 0 && rule.top_k < vocab;
  const float bound =
      by_count ? top_k_bound(scratch, rule.top_k) : top_p_bound(shift, total, vocab, rule.top_p);
  gather_candidates(logits, vocab, shift, bound, scratch);
  uint32_t key = 0;
  double weight = total;
  if (by_count) {
    key = threshold_by_count(candidates, static_cast<double>(rule.top_k));
    weight = keep_from(candidates, key);
  }
  if (rule.top_p < 1.0f) {
    key = threshold_by_weight(candidates, static_cast<double>(rule.top_p) * weight);
    weight = keep_from(candidates, key);
  }
  return {weight, from_ordered_key(key)};
}

int64_t first_equal(const float* logits, int64_t vocab, float value, const std::vector<float>& maxima) {
  const auto block = std::find(maxima.begin(), maxima.end(), value) - maxima.begin();
  const float* begin = logits + block * kRowBlock;
  return std::find(begin, logits + vocab, value) - logits;
}

}  // namespace

RowScore score_row(const float* logits, int64_t vocab, int64_t target, float temperature) {
  Scratch& scratch = scratch_for(vocab);
  const RowShift shift{block_maxima(logits, vocab, scratch.maxima.data()), temperature};
  return finish_score(logits[target], shift, weight_sums(logits, vocab, shift, nullptr));
}

Sampled sample_row(const float* logits, int64_t vocab, const SamplingRule& rule, uint64_t sample, uint32_t position) {
  const bool greedy = rule.temperature == 0.0f;
  Scratch& scratch = scratch_for(vocab);
  const RowShift shift{block_maxima(logits, vocab, scratch.maxima.data()), greedy ? 1.0f : rule.temperature};
  const RowSums sums = weight_sums(logits, vocab, shift, scratch.sums.data());
  if (!(sums.weight > 0.0) || !std::isfinite(sums.weight)) return {-1, NAN, NAN, NAN, NAN};

  int64_t token;
  Kept kept{sums.weight, -kInfinity};
  if (greedy) {
    token = first_equal(logits, vocab, shift.max, scratch.maxima);
  } else {
    const double uniform = philox_uniform(rule.seed, sample, position);
    if ((rule.top_k > 0 && rule.top_k < vocab) || rule.top_p < 1.0f) {
      kept = truncate(logits, vocab, rule, shift, sums.weight, scratch);
      token = draw_from_candidates(scratch.candidates, uniform * kept.weight);
    } else {
      token = draw_from_all(logits, vocab, shift, scratch.sums, uniform * sums.weight);
    }
  }
  const RowScore score = finish_score(logits[token], shift, sums);
  const double kept_mass = std::min(1.0, kept.weight / sums.weight);
  return {token, score.logprob, score.entropy, static_cast<float>(kept_mass), kept.threshold};
}

}  // namespace hybrid
