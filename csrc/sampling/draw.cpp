#include "sampling/draw.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>

namespace hybrid {
namespace {

// Working memory of one thread, grown to the largest need seen: drawing a token allocates nothing after the first.
struct Scratch {
  KernelVector<Candidate> candidates, working;
  KernelVector<float> numbers;

  static Scratch& of_this_thread() {
    thread_local Scratch scratch;
    return scratch;
  }
};

}  // namespace

RowScore score_from(const BlockStats& stats, int64_t vocab, float target_logit, float temperature, float threshold) {
  const RowTotals row = total_row(stats, row_blocks(vocab), temperature);
  return {static_cast<float>(row.logprob(target_logit, temperature)), static_cast<float>(row.entropy()), threshold,
          row.log_sum_exp(temperature)};
}

void TokenDraw::plan(const BlockStats& stats, int64_t vocab, const SamplingRule& rule, const RaceUniforms& uniforms) {
  stats_ = stats;
  vocab_ = vocab;
  rule_ = rule;
  uniforms_ = uniforms;
  row_ = total_row(stats, row_blocks(vocab), effective_temperature(rule));
  blocks_.clear();
  if (!row_.is_distribution()) return;
  if (truncates(rule_, vocab_)) {
    plan_candidates();
  } else {
    blocks_.push_back(static_cast<int32_t>(greedy() ? plan_greedy() : race_of_blocks()));
  }
}

int64_t TokenDraw::plan_greedy() const {
  return std::find(stats_.max, stats_.max + row_blocks(vocab_), row_.max) - stats_.max;
}

// The whole vocabulary: first its blocks race, then the winner's tokens.
int64_t TokenDraw::race_of_blocks() {
  Race race;
  for (int64_t b = 0; b < row_blocks(vocab_); ++b) {
    race.enter(b, stats_.weight[b] * block_scale(stats_.max[b], row_.max, rule_.temperature), uniforms_.of_block(b));
  }
  return race.winner();
}

void TokenDraw::plan_candidates() {
  bound_ = cuts_by_count(rule_, vocab_) ? top_k_bound() : top_p_bound();
  for (int64_t b = 0; b < row_blocks(vocab_); ++b) {
    if (stats_.max[b] >= bound_) blocks_.push_back(static_cast<int32_t>(b));
  }
}

// The k-th greatest logit cannot be below the k-th greatest block maximum: k blocks hold at least one logit as great.
float TokenDraw::top_k_bound() const {
  const int64_t blocks = row_blocks(vocab_);
  if (rule_.top_k > blocks) return kKeepAll;
  const std::span<float> order = room_for(Scratch::of_this_thread().numbers, blocks);
  std::copy_n(stats_.max, blocks, order.begin());
  const auto kth = order.begin() + (rule_.top_k - 1);
  std::nth_element(order.begin(), kth, order.end(), std::greater<>());
  return *kth;
}

// Likewise, where the block maxima from some value up weigh top_p S, no kept logit is below that value. Where all of them
// together weigh less (a flat distribution), the nucleus still needs none of the tokens that weigh at most
// (1 - top_p) S / V each. The margins cover the rounding of weights and of the logarithm.
float TokenDraw::top_p_bound() const {
  Scratch& scratch = Scratch::of_this_thread();
  const std::span<Candidate> tops = room_for(scratch.candidates, row_blocks(vocab_));
  double total = 0.0;
  for (int64_t b = 0; b < row_blocks(vocab_); ++b) {
    const auto weight = static_cast<float>(block_scale(stats_.max[b], row_.max, rule_.temperature));
    tops[b] = {static_cast<int32_t>(b), ordered_key(stats_.max[b]), weight};
    total += weight;
  }
  const double wanted = rule_.top_p * row_.weight * (1.0 + 1e-6);
  if (total >= wanted) return from_ordered_key(threshold_by_weight(tops, wanted, scratch.working));
  const double log_weight = std::log((1.0 - rule_.top_p) * row_.weight / static_cast<double>(vocab_));
  const double bound = row_.max + rule_.temperature * (log_weight - 1e-3);
  return static_cast<float>(std::min<double>(bound, row_.max));
}

Sampled TokenDraw::finish(const float* const* logits) {
  if (blocks_.empty()) return {-1, NAN, NAN, NAN, NAN, NAN};
  return truncates(rule_, vocab_) ? finish_candidates(logits) : finish_token(logits[0]);
}

Sampled TokenDraw::finish_token(const float* logits) {
  const int64_t block = blocks_[0], count = block_size(block, vocab_);
  int64_t index;
  if (greedy()) {
    index = std::find(logits, logits + count, row_.max) - logits;
  } else {
    float weights[kRowBlock];
    block_weights(logits, count, stats_.max[block], rule_.temperature, weights);
    Race race;
    for (int64_t i = 0; i < count; ++i) race.enter(i, weights[i], uniforms_.of_token(block * kRowBlock + i));
    index = race.winner();
  }
  return sampled(block * kRowBlock + index, logits[index], row_, kKeepAll);
}

Sampled TokenDraw::finish_candidates(const float* const* logits) {
  const Kept kept = truncate(gather(logits));
  const Candidate token = race_of_candidates(kept.tokens);
  return sampled(token.token, from_ordered_key(token.key), kept_totals(logits, kept.threshold), kept.threshold);
}

// The same two races among the tokens kept.
Candidate TokenDraw::race_of_candidates(std::span<const Candidate> kept) {
  Race blocks;
  std::span<const Candidate> winner;
  for (size_t begin = 0, end; begin < kept.size(); begin = end) {
    const int64_t block = kept[begin].token / kRowBlock;
    double weight = 0.0;
    for (end = begin; end < kept.size() && kept[end].token / kRowBlock == block; ++end) weight += kept[end].weight;
    blocks.enter(block, weight, uniforms_.of_block(block));
    if (blocks.winner() == block) winner = kept.subspan(begin, end - begin);
  }
  Race tokens;
  for (int64_t i = 0; i < std::ssize(winner); ++i) tokens.enter(i, winner[i].weight, uniforms_.of_token(winner[i].token));
  return winner[tokens.winner()];
}

// Every token whose logit is at least the bound, in the order of the vocabulary.
std::span<Candidate> TokenDraw::gather(const float* const* logits) const {
  Candidate* const candidates = room_for(Scratch::of_this_thread().candidates, blocks_.size() * kRowBlock + 1).data();
  Candidate* next = candidates;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const int64_t begin = blocks_[i] * kRowBlock, count = block_size(blocks_[i], vocab_);
    float weights[kRowBlock];
    block_weights(logits[i], count, row_.max, rule_.temperature, weights);
    for (int64_t j = 0; j < count; ++j) {  // written always, kept by moving on: no branch to mispredict
      *next = {static_cast<int32_t>(begin + j), ordered_key(logits[i][j]), weights[j]};
      next += logits[i][j] >= bound_;
    }
  }
  return {candidates, next};
}

// Top-k, then top-p of what top-k left. What is kept moves to the front.
TokenDraw::Kept TokenDraw::truncate(std::span<Candidate> candidates) const {
  KernelVector<Candidate>& work = Scratch::of_this_thread().working;
  Kept kept{candidates, row_.weight, kKeepAll};
  const auto keep_from = [&kept](uint32_t key) {
    size_t count = 0;
    double weight = 0.0;
    for (const Candidate c : kept.tokens) {
      kept.tokens[count] = c;
      count += c.key >= key;
      weight += c.key >= key ? c.weight : 0.0f;
    }
    kept = {kept.tokens.first(count), weight, from_ordered_key(key)};
  };
  if (cuts_by_count(rule_, vocab_)) keep_from(threshold_by_count(kept.tokens, static_cast<double>(rule_.top_k), work));
  if (rule_.top_p < 1.0f) keep_from(threshold_by_weight(kept.tokens, rule_.top_p * kept.weight, work));
  return kept;
}

// The kept set's totals by the arithmetic of score_row: blocks that are not looked at hold none of it and add nothing.
RowTotals TokenDraw::kept_totals(const float* const* logits, float threshold) const {
  const auto blocks = std::ssize(blocks_);
  float* const base = room_for(Scratch::of_this_thread().numbers, 3 * blocks).data();
  const BlockStats kept{base, base + blocks, base + 2 * blocks};
  for (int64_t i = 0; i < blocks; ++i) {
    block_stats(logits[i], block_size(blocks_[i], vocab_), rule_.temperature, threshold, kept.from(i));
  }
  return total_row(kept, blocks, rule_.temperature);
}

Sampled TokenDraw::sampled(int64_t token, float logit, const RowTotals& kept, float threshold) const {
  const float temperature = effective_temperature(rule_);
  return {token,
          static_cast<float>(row_.logprob(logit, temperature)),
          static_cast<float>(row_.entropy()),
          static_cast<float>(std::min(1.0, kept.weight / row_.weight)),
          threshold,
          static_cast<float>(kept.logprob(logit, temperature))};
}

}  // namespace hybrid
