#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#include "common/cuda_op.h"
#include "common/dims.h"
#include "rlhf/rlhf_cuda.h"

namespace hybrid {
namespace {

using at::Tensor;

Tensor doubles(const Tensor& like, at::IntArrayRef shape) {
  return at::empty(shape, like.options().dtype(at::kDouble));
}

// Lengths outside [0, T] are cut to it on the device: looking at them here would wait for the stream.
std::tuple<Tensor, Tensor> gae_cuda(const Tensor& rewards_, const Tensor& values_, const Tensor& lengths_, double gamma,
                                    double lam) {
  Dims dims("gae", at::kCUDA);
  dims.expect(rewards_, "rewards", {"B", "T"})
      .expect(values_, "values", {"B", "T"})
      .expect(lengths_, "lengths", {"B"}, at::kLong);
  const OnDevice here(rewards_);
  const Tensor rewards = rewards_.contiguous(), values = values_.contiguous(), lengths = lengths_.contiguous();
  const Tensor advantages = at::empty_like(rewards), returns = at::empty_like(rewards);
  cuda::gae({.rewards = input<float>(rewards),
             .values = input<float>(values),
             .lengths = input<int64_t>(lengths),
             .advantages = output<float>(advantages),
             .returns = output<float>(returns),
             .batch = dims["B"],
             .steps = dims["T"],
             .gamma = gamma,
             .lam = lam},
            here.stream);
  return {advantages, returns};
}

Tensor masked_moments_cuda(const Tensor& x_, const Tensor& mask_) {
  Dims("masked_moments", at::kCUDA).expect(x_, "x", {"..."}).expect(mask_, "mask", {"..."}, at::kBool);
  const OnDevice here(x_);
  const Tensor x = x_.contiguous(), mask = mask_.contiguous();
  const Tensor moments = doubles(x, {3}), partial = doubles(x, {cuda::rlhf_chunks(x.numel()), 2});
  cuda::masked_moments(input<float>(x), input<bool>(mask), x.numel(), output<double>(moments), output<double>(partial),
                       here.stream);
  return moments;
}

Tensor masked_whiten_cuda(const Tensor& x_, const Tensor& mask_, const Tensor& moments_, bool shift_mean) {
  Dims("masked_whiten", at::kCUDA)
      .expect(x_, "x", {"..."})
      .expect(mask_, "mask", {"..."}, at::kBool)
      .expect(moments_, "moments", {"3"}, at::kDouble);
  const OnDevice here(x_);
  const Tensor x = x_.contiguous(), mask = mask_.contiguous(), moments = moments_.contiguous();
  const Tensor y = at::empty_like(x);
  cuda::masked_whiten(input<float>(x), input<bool>(mask), input<double>(moments), shift_mean, output<float>(y),
                      x.numel(), here.stream);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> ppo_policy_loss_cuda(const Tensor& logprob_, const Tensor& old_logprob_,
                                                        const Tensor& advantages_, const Tensor& mask_, double clip_low,
                                                        double clip_high, double dual_clip) {
  Dims("ppo_policy_loss", at::kCUDA)
      .expect(logprob_, "logprob", {"..."})
      .expect(old_logprob_, "old_logprob", {"..."})
      .expect(advantages_, "advantages", {"..."})
      .expect(mask_, "mask", {"..."}, at::kBool);
  TORCH_CHECK_VALUE(clip_low >= 0.0 && clip_low <= 1.0, "ppo_policy_loss: clip_low is ", clip_low,
                    "; expected 0 <= clip_low <= 1");
  TORCH_CHECK_VALUE(clip_high >= 0.0, "ppo_policy_loss: clip_high is ", clip_high, "; expected 0 or more");
  TORCH_CHECK_VALUE(dual_clip == 0.0 || dual_clip > 1.0, "ppo_policy_loss: dual_clip is ", dual_clip,
                    "; expected 0 (off) or more than 1");
  const OnDevice here(logprob_);
  const Tensor logprob = logprob_.contiguous(), old_logprob = old_logprob_.contiguous();
  const Tensor advantages = advantages_.contiguous(), mask = mask_.contiguous();
  const Tensor grad = at::empty_like(logprob), loss = doubles(logprob, {}),
               stats = doubles(logprob, {cuda::kPolicyStats});
  const Tensor partial = doubles(logprob, {cuda::rlhf_chunks(logprob.numel()), 1 + cuda::kPolicyStats});
  cuda::ppo_policy_loss({.logprob = input<float>(logprob),
                         .old_logprob = input<float>(old_logprob),
                         .advantages = input<float>(advantages),
                         .mask = input<bool>(mask),
                         .grad = output<float>(grad),
                         .count = logprob.numel(),
                         .clip_low = clip_low,
                         .clip_high = clip_high,
                         .dual_clip = dual_clip},
                        output<double>(loss), output<double>(stats), output<double>(partial), here.stream);
  return {loss, grad, stats};
}

std::tuple<Tensor, Tensor, Tensor> ppo_value_loss_cuda(const Tensor& values_, const Tensor& old_values_,
                                                       const Tensor& returns_, const Tensor& mask_, double clip) {
  Dims("ppo_value_loss", at::kCUDA)
      .expect(values_, "values", {"..."})
      .expect(old_values_, "old_values", {"..."})
      .expect(returns_, "returns", {"..."})
      .expect(mask_, "mask", {"..."}, at::kBool);
  TORCH_CHECK_VALUE(clip >= 0.0, "ppo_value_loss: clip is ", clip, "; expected 0 or more (inf for no clip)");
  const OnDevice here(values_);
  const Tensor values = values_.contiguous(), old_values = old_values_.contiguous();
  const Tensor returns = returns_.contiguous(), mask = mask_.contiguous();
  const Tensor grad = at::empty_like(values), loss = doubles(values, {}), stats = doubles(values, {cuda::kValueStats});
  const Tensor partial = doubles(values, {cuda::rlhf_chunks(values.numel()), 1 + cuda::kValueStats});
  cuda::ppo_value_loss({.values = input<float>(values),
                        .old_values = input<float>(old_values),
                        .returns = input<float>(returns),
                        .mask = input<bool>(mask),
                        .grad = output<float>(grad),
                        .count = values.numel(),
                        .clip = clip},
                       output<double>(loss), output<double>(stats), output<double>(partial), here.stream);
  return {loss, grad, stats};
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CUDA, m) {
  m.impl("gae", gae_cuda);
  m.impl("masked_moments", masked_moments_cuda);
  m.impl("masked_whiten", masked_whiten_cuda);
  m.impl("ppo_policy_loss", ppo_policy_loss_cuda);
  m.impl("ppo_value_loss", ppo_value_loss_cuda);
}

}  // namespace hybrid
