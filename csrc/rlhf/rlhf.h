// Advantages, whitening and PPO losses of a batch of responses. All sums run in double over fixed chunks merged in
// index order, so that results do not depend on the number of threads.
#pragma once
#include <cstdint>

namespace hybrid {

// Generalised advantage estimation (Schulman et al., 2016), each row from the last of its lengths[b] tokens backwards;
// results past the length are 0, and so is the value after the last token. 0 <= lengths[b] <= steps.
struct GaeArgs {
  const float* rewards;    // [batch, steps]
  const float* values;     // [batch, steps]
  const int64_t* lengths;  // [batch]
  float* advantages;       // [batch, steps]
  float* returns;          // [batch, steps]: advantages + values, before any whitening
  int64_t batch, steps;
  double gamma, lam;
};
void gae(const GaeArgs& args);

struct Moments {
  double count, mean, squares;  // squares: sum of squared deviations from the mean
};
Moments masked_moments(const float* x, const bool* mask, int64_t count);

// y = (x - mean) / sqrt(squares / (count - 1) + 1e-8) where mask holds, else 0; the mean is added back unless
// shift_mean.
void masked_whiten(const float* x, const bool* mask, const Moments& moments, bool shift_mean, float* y, int64_t count);

struct PolicyLossArgs {
  const float* logprob;      // [count]
  const float* old_logprob;  // [count]
  const float* advantages;   // [count]
  const bool* mask;          // [count]
  float* grad;               // [count]: d loss / d logprob, 0 outside the mask
  int64_t count;
  double clip_low, clip_high;
  double dual_clip;  // bound c of -c A for negative advantages; 0 without
};
// Sums over the mask, except ratio_max. With r = exp(d), d = logprob - old_logprob cut at +-20.
struct PolicyLoss {
  double loss;
  double count;
  double clipped_low;   // tokens whose gradient the clip removes, at r < 1 - clip_low
  double clipped_high;  // at r > 1 + clip_high
  double kl_k2, kl_k3;  // d^2 / 2 and r - 1 - d: two estimates of KL(old || new)
  double ratio, ratio_max;
};
PolicyLoss ppo_policy_loss(const PolicyLossArgs& args);

struct ValueLossArgs {
  const float* values;      // [count]
  const float* old_values;  // [count]
  const float* returns;     // [count]
  const bool* mask;         // [count]
  float* grad;              // [count]: d loss / d value, 0 outside the mask
  int64_t count;
  double clip;  // infinity for the plain squared error
};
// Sums over the mask; error = returns - values.
struct ValueLoss {
  double loss;
  double count, clipped;
  double error, error_square;
  double target, target_square;
};
ValueLoss ppo_value_loss(const ValueLossArgs& args);

}  // namespace hybrid
