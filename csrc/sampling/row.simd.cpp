// Two passes over a row: the maximum, then the weights. Both read 4 bytes a logit and write next to nothing; the first
// is bound by loads, the second by the exponential. A row of 50k logits (200 KB) stays in the second-level cache
// between them.
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
Vec fold(Block block) {
  for (int64_t half = kVecs / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) block.vec[i] += block.vec[i + half];
  }
  return block.vec[0];
}

// A running sum of vectors, each lane in double.
class WideSum {
 public:
  void add(Vec x) { lanes_ += __builtin_convertvector(x.v, Wide); }
  double total() const {
    double sum = 0.0;
    for (int64_t i = 0; i < Vec::width; ++i) sum += lanes_[i];
    return sum;
  }

 private:
  typedef double Wide __attribute__((vector_size(kVecWidth * sizeof(double))));
  Wide lanes_{};
};

// (x - m) / temperature. The quotient is a product with 1 / temperature in two floats: as good as a division, and
// cheaper. From -200 down every weight is exactly 0, so the difference is cut there and 0 * infinity cannot arise.
class Exponent {
 public:
  explicit Exponent(RowShift shift)
      : max_(shift.max),
        floor_(-200.0f * shift.temperature),
        inverse_(static_cast<float>(1.0 / shift.temperature)),
        inverse_rest_(static_cast<float>(1.0 / shift.temperature - static_cast<double>(inverse_[0]))) {}

  Vec operator()(Vec logits) const {
    const Vec difference = max(floor_, logits - max_);  // keeps NaN
    return fma(difference, inverse_, difference * inverse_rest_);
  }

 private:
  Vec max_, floor_, inverse_, inverse_rest_;
};

}  // namespace

float block_maxima(const float* logits, int64_t vocab, float* maxima) {
  Vec row_max(kNegInf);
  for (int64_t begin = 0, b = 0; begin < vocab; begin += kRowBlock, ++b) {
    Block block = load_block(logits + begin, vocab - begin);
    for (int64_t half = kVecs / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) block.vec[i] = max(block.vec[i], block.vec[i + half]);
    }
    row_max = max(row_max, block.vec[0]);
    maxima[b] = reduce_max(block.vec[0]);
  }
  return reduce_max(row_max);
}

RowSums weight_sums(const float* logits, int64_t vocab, RowShift shift, float* sums) {
  const Exponent exponent(shift);
  WideSum weight_sum, weighted_sum;
  for (int64_t begin = 0, b = 0; begin < vocab; begin += kRowBlock, ++b) {
    Block weight = load_block(logits + begin, vocab - begin), weighted;
    for (int64_t i = 0; i < kVecs; ++i) {
      const Vec e = exponent(weight.vec[i]);
      weight.vec[i] = exp(e);
      weighted.vec[i] = weight.vec[i] * e;
    }
    const Vec folded = fold(weight);
    weight_sum.add(folded);
    weighted_sum.add(fold(weighted));
    if (sums != nullptr) sums[b] = reduce_add(folded);
  }
  return {weight_sum.total(), weighted_sum.total()};
}

void block_weights(const float* logits, int64_t count, RowShift shift, float* weights) {
  const Exponent exponent(shift);
  const Block block = load_block(logits, count);
  float whole[kRowBlock];
  for (int64_t i = 0; i < kVecs; ++i) exp(exponent(block.vec[i])).store(whole + i * Vec::width);
  for (int64_t i = 0; i < count; ++i) weights[i] = whole[i];
}

void score_row_backward(const RowGradArgs& args) {
  // With z = logits / temperature: d logprob / dz_j = [j = target] - p_j, d entropy / dz_j = -p_j (log p_j + entropy).
  // p_j = exp(z_j - lse) would carry the rounding of z and lse. Instead the row is shifted by the float nearest to
  // temperature * lse, and what that float misses becomes a factor near 1.
  const float shift = static_cast<float>(args.lse * args.temperature);
  const float log_missing = static_cast<float>(shift / static_cast<double>(args.temperature) - args.lse);
  const float inverse = 1.0f / args.temperature;
  const Exponent exponent({shift, args.temperature});
  const Vec missing(log_missing), scale(-inverse * expf(log_missing));
  const Vec constant(args.grad_logprob + args.grad_entropy * args.entropy), slope(args.grad_entropy);
  for_each_vec(args.vocab, [&](int64_t i, int64_t lanes) {
    const Vec e = exponent(Vec::load(args.logits + i, lanes));
    (exp(e) * fma(slope, e + missing, constant) * scale).store(args.grad + i, lanes);
  });
  args.grad[args.target] += args.grad_logprob * inverse;
}

}  // namespace hybrid::HYBRID_ISA
