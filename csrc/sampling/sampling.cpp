#include "sampling/sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <limits>
#include <span>
#include <vector>

#include "sampling/race.h"
#include "sampling/row.h"
#include "sampling/threshold.h"

namespace hybrid {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Buffers of one thread, grown to the largest vocabulary seen: sampling a token allocates nothing after the first.
struct Scratch {
  std::vector<float> maxima, sums;             // [row_blocks(vocab)]
  std::vector<float> order;                    // copy of maxima to be partitioned
  std::vector<Candidate> candidates, working;  // candidates is at least [vocab + 1] long when truncating

  static Scratch& of_this_thread(int64_t vocab) {
    thread_local Scratch scratch;
    scratch.maxima.resize(row_blocks(vocab));
    scratch.sums.resize(row_blocks(vocab));
    return scratch;
  }
};

// The log-probability is formed in double from the exact logits: one rounding, on top of the error of log S.
RowScore finish_score(float target_logit, RowShift shift, RowSums sums) {
  const double log_sum = std::log(sums.weight);
  const double target = (static_cast<double>(target_logit) - shift.max) / shift.temperature;
  const double entropy = log_sum - sums.weighted / sums.weight;
  return {static_cast<float>(target - log_sum), static_cast<float>(entropy < 0.0 ? 0.0 : entropy),
          shift.max / static_cast<double>(shift.temperature) + log_sum};
}

// The whole vocabulary: a race of the blocks, then of the winner's tokens.
int64_t draw_from_all(const float* logits, int64_t vocab, RowShift shift, const std::vector<float>& sums,
                      RaceUniforms& uniforms) {
  Race blocks;
  for (int64_t b = 0; b < row_blocks(vocab); ++b) blocks.enter(b, sums[b], uniforms.of_block(b));
  const int64_t begin = blocks.winner() * kRowBlock, count = std::min(kRowBlock, vocab - begin);
  float weights[kRowBlock];
  block_weights(logits + begin, count, shift, weights);
  Race tokens;
  for (int64_t i = 0; i < count; ++i) tokens.enter(begin + i, weights[i], uniforms.of_token(begin + i));
  return tokens.winner();
}

// The same races among the tokens kept, which are in vocabulary order.
int64_t draw_from_candidates(std::span<const Candidate> kept, RaceUniforms& uniforms) {
  Race blocks;
  std::span<const Candidate> winner;
  for (size_t begin = 0, end; begin < kept.size(); begin = end) {
    const int64_t block = kept[begin].token / kRowBlock;
    double weight = 0.0;
    for (end = begin; end < kept.size() && kept[end].token / kRowBlock == block; ++end) weight += kept[end].weight;
    blocks.enter(block, weight, uniforms.of_block(block));
    if (blocks.winner() == block) winner = kept.subspan(begin, end - begin);
  }
  Race tokens;
  for (const Candidate c : winner) tokens.enter(c.token, c.weight, uniforms.of_token(c.token));
  return tokens.winner();
}

// A logit that the k-th greatest one cannot be below: k blocks hold at least one logit as great as the k-th block
// maximum.
float top_k_bound(Scratch& scratch, int64_t top_k) {
  scratch.order = scratch.maxima;
  if (top_k > static_cast<int64_t>(scratch.order.size())) return -kInfinity;
  const auto kth = scratch.order.begin() + (top_k - 1);
  std::nth_element(scratch.order.begin(), kth, scratch.order.end(), std::greater<>());
  return *kth;
}

// A logit below which all the vocabulary together weighs at most (1 - top_p) S, so that the nucleus needs none of it: V
// tokens of weight (1 - top_p) S / V. The margin covers the rounding of the logarithm.
float top_p_bound(RowShift shift, double total, int64_t vocab, float top_p) {
  const double log_weight = std::log((1.0 - top_p) * total / static_cast<double>(vocab));
  const double bound = shift.max + shift.temperature * (log_weight - 1e-3);
  return static_cast<float>(std::min<double>(bound, shift.max));
}

// Every token whose logit is at least `bound`, in vocabulary order.
std::span<Candidate> gather_candidates(const float* logits, int64_t vocab, RowShift shift, float bound,
                                       Scratch& scratch) {
  if (std::ssize(scratch.candidates) <= vocab) scratch.candidates.resize(vocab + 1);
  Candidate* next = scratch.candidates.data();
  for (int64_t b = 0; b < row_blocks(vocab); ++b) {
    if (scratch.maxima[b] < bound) continue;
    const int64_t begin = b * kRowBlock, count = std::min(kRowBlock, vocab - begin);
    float weights[kRowBlock];
    block_weights(logits + begin, count, shift, weights);
    for (int64_t i = 0; i < count; ++i) {  // written always, kept by moving on: no branch to mispredict
      *next = {static_cast<int32_t>(begin + i), ordered_key(logits[begin + i]), weights[i]};
      next += logits[begin + i] >= bound;
    }
  }
  return {scratch.candidates.data(), next};
}

struct Kept {
  std::span<Candidate> tokens;  // in vocabulary order; empty when nothing was cut
  double weight;
  float threshold;
};

// The candidates from `key` up, moved to the front.
Kept keep_from(std::span<Candidate> candidates, uint32_t key) {
  size_t kept = 0;
  double weight = 0.0;
  for (const Candidate c : candidates) {
    candidates[kept] = c;
    kept += c.key >= key;
    weight += c.key >= key ? c.weight : 0.0f;
  }
  return {candidates.first(kept), weight, from_ordered_key(key)};
}

bool cuts_by_count(const SamplingRule& rule, int64_t vocab) { return rule.top_k > 0 && rule.top_k < vocab; }

// Top-k, then top-p of what top-k left.
Kept truncate(const float* logits, int64_t vocab, const SamplingRule& rule, RowShift shift, double total,
              Scratch& scratch) {
  const bool by_count = cuts_by_count(rule, vocab);
  const float bound = by_count ? top_k_bound(scratch, rule.top_k) : top_p_bound(shift, total, vocab, rule.top_p);
  Kept kept{gather_candidates(logits, vocab, shift, bound, scratch), total, -kInfinity};
  if (by_count) {
    kept = keep_from(kept.tokens, threshold_by_count(kept.tokens, static_cast<double>(rule.top_k), scratch.working));
  }
  if (rule.top_p < 1.0f) {
    kept = keep_from(kept.tokens, threshold_by_weight(kept.tokens, rule.top_p * kept.weight, scratch.working));
  }
  return kept;
}

int64_t first_equal(const float* logits, int64_t vocab, float value, const std::vector<float>& maxima) {
  const auto block = std::find(maxima.begin(), maxima.end(), value) - maxima.begin();
  const float* begin = logits + block * kRowBlock;
  return std::find(begin, logits + vocab, value) - logits;
}

}  // namespace

RowScore score_row(const float* logits, int64_t vocab, int64_t target, float temperature) {
  Scratch& scratch = Scratch::of_this_thread(vocab);
  const RowShift shift{block_maxima(logits, vocab, scratch.maxima.data()), temperature};
  return finish_score(logits[target], shift, weight_sums(logits, vocab, shift, nullptr));
}

Sampled sample_row(const float* logits, int64_t vocab, const SamplingRule& rule, uint64_t sample, uint32_t position) {
  const bool greedy = rule.temperature == 0.0f;
  Scratch& scratch = Scratch::of_this_thread(vocab);
  const RowShift shift{block_maxima(logits, vocab, scratch.maxima.data()), greedy ? 1.0f : rule.temperature};
  const RowSums sums = weight_sums(logits, vocab, shift, scratch.sums.data());
  if (!(sums.weight > 0.0) || !std::isfinite(sums.weight)) return {-1, NAN, NAN, NAN, NAN};

  int64_t token;
  Kept kept{{}, sums.weight, -kInfinity};
  RaceUniforms uniforms(rule.seed, sample, position);
  if (greedy) {
    token = first_equal(logits, vocab, shift.max, scratch.maxima);
  } else if (cuts_by_count(rule, vocab) || rule.top_p < 1.0f) {
    kept = truncate(logits, vocab, rule, shift, sums.weight, scratch);
    token = draw_from_candidates(kept.tokens, uniforms);
  } else {
    token = draw_from_all(logits, vocab, shift, scratch.sums, uniforms);
  }
  const RowScore score = finish_score(logits[token], shift, sums);
  const double kept_mass = std::min(1.0, kept.weight / sums.weight);
  return {token, score.logprob, score.entropy, static_cast<float>(kept_mass), kept.threshold};
}

}  // namespace hybrid
