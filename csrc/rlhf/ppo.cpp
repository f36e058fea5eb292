#include <algorithm>
#include <cmath>

#include "rlhf/chunks.h"
#include "rlhf/rlhf.h"

namespace hybrid {
namespace {

// exp(20) is already no policy ratio that anyone trusts; beyond it the loss is constant rather than infinite.
constexpr double kLogRatioLimit = 20.0;

struct TokenLoss {
  double loss, grad;  // grad: with respect to the new value
  bool clipped;
};

// max(-A r, -A clip(r)); for A < 0 optionally no more than -c A. Where a constant branch wins the gradient is 0.
TokenLoss policy_token(double log_ratio, double ratio, double advantage, const PolicyLossArgs& args) {
  const double plain = -advantage * ratio;
  const double bounded = -advantage * std::clamp(ratio, 1.0 - args.clip_low, 1.0 + args.clip_high);
  const bool clipped = bounded > plain;
  const bool cut = std::abs(log_ratio) > kLogRatioLimit;
  TokenLoss token{clipped ? bounded : plain, clipped || cut ? 0.0 : plain, clipped};
  const double ceiling = -advantage * args.dual_clip;
  if (args.dual_clip > 0.0 && advantage < 0.0 && token.loss > ceiling) token = {ceiling, 0.0, clipped};
  return token;
}

TokenLoss value_token(double value, double old_value, double target, double clip) {
  const double bounded = std::min(std::max(value, old_value - clip), old_value + clip);
  const double plain_square = (value - target) * (value - target);
  const double bounded_square = (bounded - target) * (bounded - target);
  if (bounded_square > plain_square) return {0.5 * bounded_square, 0.0, true};
  return {0.5 * plain_square, value - target, false};
}

}  // namespace

static PolicyLoss& operator+=(PolicyLoss& total, const PolicyLoss& part) {
  total.loss += part.loss;
  total.count += part.count;
  total.clipped_low += part.clipped_low;
  total.clipped_high += part.clipped_high;
  total.kl_k2 += part.kl_k2;
  total.kl_k3 += part.kl_k3;
  total.ratio += part.ratio;
  total.ratio_max = std::max(total.ratio_max, part.ratio_max);
  return total;
}

static ValueLoss& operator+=(ValueLoss& total, const ValueLoss& part) {
  total.loss += part.loss;
  total.count += part.count;
  total.clipped += part.clipped;
  total.error += part.error;
  total.error_square += part.error_square;
  total.target += part.target;
  total.target_square += part.target_square;
  return total;
}

PolicyLoss ppo_policy_loss(const PolicyLossArgs& args) {
  return sum_chunks<PolicyLoss>(args.count, [&](int64_t begin, int64_t end, PolicyLoss& sums) {
    for (int64_t i = begin; i < end; ++i) {
      args.grad[i] = 0.0f;
      if (!args.mask[i]) continue;
      const double difference = static_cast<double>(args.logprob[i]) - args.old_logprob[i];
      const double d = std::clamp(difference, -kLogRatioLimit, kLogRatioLimit);
      const double ratio = std::exp(d);
      const TokenLoss token = policy_token(difference, ratio, args.advantages[i], args);
      args.grad[i] = static_cast<float>(token.grad);
      sums += PolicyLoss{token.loss,
                         1.0,
                         double(token.clipped && ratio < 1.0),
                         double(token.clipped && ratio > 1.0),
                         0.5 * d * d,
                         std::expm1(d) - d,
                         ratio,
                         ratio};
    }
  });
}

ValueLoss ppo_value_loss(const ValueLossArgs& args) {
  return sum_chunks<ValueLoss>(args.count, [&](int64_t begin, int64_t end, ValueLoss& sums) {
    for (int64_t i = begin; i < end; ++i) {
      args.grad[i] = 0.0f;
      if (!args.mask[i]) continue;
      const double target = args.returns[i], error = target - args.values[i];
      const TokenLoss token = value_token(args.values[i], args.old_values[i], target, args.clip);
      args.grad[i] = static_cast<float>(token.grad);
      sums += ValueLoss{token.loss, 1.0, double(token.clipped), error, error * error, target, target * target};
    }
  });
}

}  // namespace hybrid
