#include "sampling/sampling.h"

#include "common/kernel_memory.h"
#include "sampling/draw.h"
#include "sampling/row.h"

namespace hybrid {
namespace {

// Statistics of one thread's row, grown to the largest vocabulary seen.
BlockStats thread_stats(int64_t vocab) {
  thread_local KernelVector<float> floats;
  const int64_t blocks = row_blocks(vocab);
  float* base = room_for(floats, 3 * blocks).data();
  return {base, base + blocks, base + 2 * blocks};
}

}  // namespace

RowScore score_row(const float* logits, int64_t vocab, int64_t target, float temperature, float threshold) {
  const BlockStats stats = thread_stats(vocab);
  const float least = logits[target] < threshold ? logits[target] : threshold;
  block_stats(logits, vocab, temperature, least, stats);
  return score_from(stats, vocab, logits[target], temperature, least);
}

Sampled sample_row(const float* logits, int64_t vocab, const SamplingRule& rule, uint64_t sample, uint32_t position) {
  thread_local TokenDraw draw;
  thread_local KernelVector<const float*> blocks;
  const BlockStats stats = thread_stats(vocab);
  block_stats(logits, vocab, effective_temperature(rule), kKeepAll, stats);
  draw.plan(stats, vocab, rule, RaceUniforms(rule.seed, sample, position));
  blocks.clear();
  for (const int32_t block : draw.blocks()) blocks.push_back(logits + block * kRowBlock);
  return draw.finish(blocks.data());
}

}  // namespace hybrid
