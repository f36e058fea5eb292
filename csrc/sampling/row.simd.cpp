// A block of 64 logits fills four to sixteen vectors: it is read once and stays in registers through its maximum, its
// weights and their sums. Bound by the exponential.
#include <math.h>

#include "common/math.h"
#include "common/vec.h"
#include "sampling/row.h"

namespace hybrid::HYBRID_ISA {
namespace {

constexpr int64_t kVecs = kRowBlock / Vec::width;
constexpr float kNegInf = -__builtin_inff();

struct Block {
  Vec vec[kVecs];
};

Block load_block(const float* logits, int64_t count) {
  Block block;
  if (count >= kRowBlock) {
    for (int64_t i = 0; i < kVecs; ++i) block.vec[i] = Vec::load(logits + i * Vec::width);
    return block;
  }
  float padded[kRowBlock];
  for (int64_t i = 0; i < kRowBlock; ++i) padded[i] = i < count ? logits[i] : kNegInf;
  for (int64_t i = 0; i < kVecs; ++i) block.vec[i] = Vec::load(padded + i * Vec::width);
  return block;
}

// Halves the block until one vector is left.
template <typename Combine>
Vec fold(Block block, const Combine& combine) {
  for (int64_t half = kVecs / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) block.vec[i] = combine(block.vec[i], block.vec[i + half]);
  }
  return block.vec[0];
}
float sum_of(const Block& block) {
  return reduce_add(fold(block, [](Vec a, Vec b) { return a + b; }));
}
float max_of(const Block& block) {
  return reduce_max(fold(block, [](Vec a, Vec b) { return max(a, b); }));
}

// What is subtracted from a block's logits: its maximum, or 0 where all are -inf, so that -inf - -inf cannot arise.
Vec shift_of(float block_max) { return Vec(block_max == kNegInf ? 0.0f : block_max); }

// (x - m) / temperature. The quotient is a product with 1 / temperature in two floats: as good as a division, and
// cheaper. From -200 down every weight is exactly 0, so the difference is cut there and 0 * infinity cannot arise.
class Exponent {
 public:
  explicit Exponent(float temperature)
      : floor_(-200.0f * temperature),
        inverse_(static_cast<float>(1.0 / temperature)),
        inverse_rest_(static_cast<float>(1.0 / temperature - static_cast<double>(inverse_[0]))) {}

  Vec operator()(Vec logits, Vec shift) const {
    const Vec difference = max(floor_, logits - shift);  // keeps NaN
    return fma(difference, inverse_, difference * inverse_rest_);
  }

 private:
  Vec floor_, inverse_, inverse_rest_;
};

}  // namespace

void block_stats(const float* logits, int64_t count, float temperature, float threshold, const BlockStats& stats) {
  const Exponent exponent(temperature);
  const Vec least(threshold);
  for (int64_t begin = 0, b = 0; begin < count; begin += kRowBlock, ++b) {
    const Block block = load_block(logits + begin, count - begin);
    const float block_max = max_of(block);
    const Vec shift = shift_of(block_max);
    Block weight, weighted;
    for (int64_t i = 0; i < kVecs; ++i) {
      const Vec e = exponent(block.vec[i], shift);
      weight.vec[i] = select(block.vec[i] < least, Vec(), exp(e));  // keeps NaN
      weighted.vec[i] = weight.vec[i] * e;
    }
    stats.max[b] = block_max;
    stats.weight[b] = sum_of(weight);
    stats.weighted[b] = sum_of(weighted);
  }
}

void block_weights(const float* logits, int64_t count, float max, float temperature, float* weights) {
  const Exponent exponent(temperature);
  const Vec shift = shift_of(max);
  const Block block = load_block(logits, count);
  float whole[kRowBlock];
  for (int64_t i = 0; i < kVecs; ++i) exp(exponent(block.vec[i], shift)).store(whole + i * Vec::width);
  for (int64_t i = 0; i < count; ++i) weights[i] = whole[i];
}

void score_row_backward(const RowGradArgs& args) {
  // With z = logits / temperature: d logprob / dz_j = [j = target] - p_j, d entropy / dz_j = -p_j (log p_j + entropy).
  // p_j = exp(z_j - lse) would carry the rounding of z and lse. Instead the row is shifted by the float nearest to
  // temperature * lse, and what that float misses becomes a factor near 1.
  const float shift = static_cast<float>(args.lse * args.temperature);
  const float log_missing = static_cast<float>(shift / static_cast<double>(args.temperature) - args.lse);
  const float inverse = 1.0f / args.temperature;
  const Exponent exponent(args.temperature);
  const Vec missing(log_missing), scale(-inverse * expf(log_missing)), least(args.threshold);
  const Vec constant(args.grad_logprob + args.grad_entropy * args.entropy), slope(args.grad_entropy);
  for_each_vec(args.vocab, [&](int64_t i, int64_t lanes) {
    const Vec logits = Vec::load(args.logits + i, lanes);
    const Vec e = exponent(logits, shift);
    const Vec grad = exp(e) * fma(slope, e + missing, constant) * scale;
    select(logits < least, Vec(), grad).store(args.grad + i, lanes);
  });
  args.grad[args.target] += args.grad_logprob * inverse;
}

}  // namespace hybrid::HYBRID_ISA
