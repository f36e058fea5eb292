#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <initializer_list>
#include <tuple>

#include "common/dims.h"
#include "rlhf/rlhf.h"

namespace hybrid {
namespace {

using at::Tensor;

Tensor double_tensor(std::initializer_list<double> values) {
  Tensor out = at::empty({static_cast<int64_t>(values.size())}, at::kDouble);
  std::copy(values.begin(), values.end(), out.mutable_data_ptr<double>());
  return out;
}

Tensor double_scalar(double value) { return double_tensor({value}).squeeze(0); }

std::tuple<Tensor, Tensor> gae_cpu(const Tensor& rewards_, const Tensor& values_, const Tensor& lengths_, double gamma,
                                   double lam) {
  Dims dims("gae");
  dims.expect(rewards_, "rewards", {"B", "T"})
      .expect(values_, "values", {"B", "T"})
      .expect(lengths_, "lengths", {"B"}, at::kLong);
  const Tensor rewards = rewards_.contiguous(), values = values_.contiguous(), lengths = lengths_.contiguous();
  const int64_t* length = lengths.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < dims["B"]; ++b) {
    TORCH_CHECK_VALUE(length[b] >= 0 && length[b] <= dims["T"], "gae: lengths[", b, "] is ", length[b],
                      "; expected 0 <= length <= T=", dims["T"]);
  }
  Tensor advantages = at::empty_like(rewards), returns = at::empty_like(rewards);
  gae({.rewards = rewards.const_data_ptr<float>(),
       .values = values.const_data_ptr<float>(),
       .lengths = length,
       .advantages = advantages.mutable_data_ptr<float>(),
       .returns = returns.mutable_data_ptr<float>(),
       .batch = dims["B"],
       .steps = dims["T"],
       .gamma = gamma,
       .lam = lam});
  return {advantages, returns};
}

Tensor masked_moments_cpu(const Tensor& x_, const Tensor& mask_) {
  Dims("masked_moments").expect(x_, "x", {"..."}).expect(mask_, "mask", {"..."}, at::kBool);
  const Tensor x = x_.contiguous(), mask = mask_.contiguous();
  const Moments m = masked_moments(x.const_data_ptr<float>(), mask.const_data_ptr<bool>(), x.numel());
  return double_tensor({m.count, m.mean, m.squares});
}

Tensor masked_whiten_cpu(const Tensor& x_, const Tensor& mask_, const Tensor& moments_, bool shift_mean) {
  Dims("masked_whiten")
      .expect(x_, "x", {"..."})
      .expect(mask_, "mask", {"..."}, at::kBool)
      .expect(moments_, "moments", {"3"}, at::kDouble);
  const Tensor x = x_.contiguous(), mask = mask_.contiguous(), moments = moments_.contiguous();
  const double* m = moments.const_data_ptr<double>();
  Tensor y = at::empty_like(x);
  masked_whiten(x.const_data_ptr<float>(), mask.const_data_ptr<bool>(), {m[0], m[1], m[2]}, shift_mean,
                y.mutable_data_ptr<float>(), x.numel());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> ppo_policy_loss_cpu(const Tensor& logprob_, const Tensor& old_logprob_,
                                                       const Tensor& advantages_, const Tensor& mask_, double clip_low,
                                                       double clip_high, double dual_clip) {
  Dims("ppo_policy_loss")
      .expect(logprob_, "logprob", {"..."})
      .expect(old_logprob_, "old_logprob", {"..."})
      .expect(advantages_, "advantages", {"..."})
      .expect(mask_, "mask", {"..."}, at::kBool);
  TORCH_CHECK_VALUE(clip_low >= 0.0 && clip_low <= 1.0, "ppo_policy_loss: clip_low is ", clip_low,
                    "; expected 0 <= clip_low <= 1");
  TORCH_CHECK_VALUE(clip_high >= 0.0, "ppo_policy_loss: clip_high is ", clip_high, "; expected 0 or more");
  TORCH_CHECK_VALUE(dual_clip == 0.0 || dual_clip > 1.0, "ppo_policy_loss: dual_clip is ", dual_clip,
                    "; expected 0 (off) or more than 1");
  const Tensor logprob = logprob_.contiguous(), old_logprob = old_logprob_.contiguous();
  const Tensor advantages = advantages_.contiguous(), mask = mask_.contiguous();
  Tensor grad = at::empty_like(logprob);
  const PolicyLoss sums = ppo_policy_loss({.logprob = logprob.const_data_ptr<float>(),
                                           .old_logprob = old_logprob.const_data_ptr<float>(),
                                           .advantages = advantages.const_data_ptr<float>(),
                                           .mask = mask.const_data_ptr<bool>(),
                                           .grad = grad.mutable_data_ptr<float>(),
                                           .count = logprob.numel(),
                                           .clip_low = clip_low,
                                           .clip_high = clip_high,
                                           .dual_clip = dual_clip});
  return {double_scalar(sums.loss), grad,
          double_tensor(
              {sums.count, sums.clipped_low, sums.clipped_high, sums.kl_k2, sums.kl_k3, sums.ratio, sums.ratio_max})};
}

std::tuple<Tensor, Tensor, Tensor> ppo_value_loss_cpu(const Tensor& values_, const Tensor& old_values_,
                                                      const Tensor& returns_, const Tensor& mask_, double clip) {
  Dims("ppo_value_loss")
      .expect(values_, "values", {"..."})
      .expect(old_values_, "old_values", {"..."})
      .expect(returns_, "returns", {"..."})
      .expect(mask_, "mask", {"..."}, at::kBool);
  TORCH_CHECK_VALUE(clip >= 0.0, "ppo_value_loss: clip is ", clip, "; expected 0 or more (inf for no clip)");
  const Tensor values = values_.contiguous(), old_values = old_values_.contiguous();
  const Tensor returns = returns_.contiguous(), mask = mask_.contiguous();
  Tensor grad = at::empty_like(values);
  const ValueLoss sums = ppo_value_loss({.values = values.const_data_ptr<float>(),
                                         .old_values = old_values.const_data_ptr<float>(),
                                         .returns = returns.const_data_ptr<float>(),
                                         .mask = mask.const_data_ptr<bool>(),
                                         .grad = grad.mutable_data_ptr<float>(),
                                         .count = values.numel(),
                                         .clip = clip});
  return {double_scalar(sums.loss), grad,
          double_tensor({sums.count, sums.clipped, sums.error, sums.error_square, sums.target, sums.target_square})};
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CPU, m) {
  m.impl("gae", gae_cpu);
  m.impl("masked_moments", masked_moments_cpu);
  m.impl("masked_whiten", masked_whiten_cpu);
  m.impl("ppo_policy_loss", ppo_policy_loss_cpu);
  m.impl("ppo_value_loss", ppo_value_loss_cpu);
}

}  // namespace hybrid
