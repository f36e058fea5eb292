// Generalised advantages, whitening and PPO losses of a batch of responses.
//
// gae: a warp owns a response and walks it backwards 32 tokens at a time; within them the recurrence A_t = d_t + c A_{t+1} is a scan
// of five shuffles. 8 bytes read and 8 written a token, coalesced; bound by latency: about 100 cycles for 32 tokens of the longest.
// masked_moments, losses: a block sums a chunk of kRlhfChunk tokens; 5 to 17 bytes a token, 20 to 60 double operations;
// bound by launch latency (batches are below a million tokens).
//
// Its functions are not templates: one source file of a program includes it.
#pragma once
#include "rlhf/rlhf_cuda.h"
#include "rlhf/sums.cuh"

namespace hybrid::cuda {

constexpr int kGaeWarps = 4;  // responses of a block

__global__ void __launch_bounds__(kWarpSize* kGaeWarps) gae_kernel(GaeArgs p) {
  const int lane = threadIdx.x;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kGaeWarps + threadIdx.y;
  if (row >= p.batch) return;
  const float* rewards = p.rewards + row * p.steps;
  const float* values = p.values + row * p.steps;
  const int64_t length = smaller(p.lengths[row], p.steps);
  const double decay = p.gamma * p.lam;
  double reach = decay;  // decay^(32 - lane): how much of the advantage after these 32 tokens this one gets
  for (int i = lane + 1; i < kWarpSize; ++i) reach *= decay;

  double after = 0.0;  // the advantage of the first token after these 32
  for (int64_t base = (p.steps - 1) / kWarpSize * kWarpSize; base >= 0; base -= kWarpSize) {
    const int64_t t = base + lane;
    const bool inside = t < length;
    const double value = inside ? values[t] : 0.0;
    const double next_value = t + 1 < length ? values[t + 1] : 0.0;
    double advantage = inside ? rewards[t] + p.gamma * next_value - value : 0.0;
    double power = decay;
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const double later = __shfl_down_sync(kAllLanes, advantage, distance);
      if (lane + distance < kWarpSize) advantage = fma(power, later, advantage);
      power *= power;
    }
    advantage = fma(reach, after, advantage);
    after = __shfl_sync(kAllLanes, advantage, 0);
    if (t < p.steps) {
      p.advantages[row * p.steps + t] = inside ? static_cast<float>(advantage) : 0.0f;
      p.returns[row * p.steps + t] = inside ? static_cast<float>(advantage + value) : 0.0f;
    }
  }
}

void gae(const GaeArgs& p, Stream stream) {
  if (p.batch == 0 || p.steps == 0) return;
  launch(gae_kernel, {dim3(static_cast<unsigned>(ceil_div(p.batch, kGaeWarps))), dim3(kWarpSize, kGaeWarps)}, stream, p);
}

// ---- moments and whitening ---------------------------------------------------------------------------------------------------

struct KeptSum {  // how many, and their sum
  static constexpr int kTerms = 2;
  static constexpr bool kLastIsMax = false;
  const float* x;
  const bool* mask;
  __device__ void add(int64_t i, Sums<2>& total) const {
    if (!mask[i]) return;
    total.value[0] += 1.0;
    total.value[1] += x[i];
  }
};
struct StoreMean {
  double* moments;
  __device__ void operator()(const Sums<2>& total) const {
    moments[0] = total.value[0];
    moments[1] = total.value[0] > 0.0 ? total.value[1] / total.value[0] : 0.0;
  }
};

struct KeptSquares {  // deviations from the mean, squared once that is known
  static constexpr int kTerms = 1;
  static constexpr bool kLastIsMax = false;
  const float* x;
  const bool* mask;
  const double* moments;
  __device__ void add(int64_t i, Sums<1>& total) const {
    if (!mask[i]) return;
    const double deviation = x[i] - moments[1];
    total.value[0] += deviation * deviation;
  }
};
struct StoreSquares {
  double* moments;
  __device__ void operator()(const Sums<1>& total) const { moments[2] = total.value[0]; }
};

void masked_moments(const float* x, const bool* mask, int64_t count, double* moments, double* partial,
                           Stream stream) {
  sum_terms(KeptSum{x, mask}, count, kRlhfChunk, partial, StoreMean{moments}, stream);
  sum_terms(KeptSquares{x, mask, moments}, count, kRlhfChunk, partial, StoreSquares{moments}, stream);
}

constexpr double kVarianceEps = 1e-8;

__global__ void __launch_bounds__(kSumThreads)
    masked_whiten_kernel(const float* x, const bool* mask, const double* moments, bool shift_mean, float* y,
                         int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= count) return;
  const double degrees = moments[0] > 2.0 ? moments[0] - 1.0 : 1.0;  // Bessel's
  const double scale = 1.0 / sqrt(moments[2] / degrees + kVarianceEps);
  const double restored = shift_mean ? 0.0 : moments[1];
  y[i] = mask[i] ? static_cast<float>((x[i] - moments[1]) * scale + restored) : 0.0f;
}

void masked_whiten(const float* x, const bool* mask, const double* moments, bool shift_mean, float* y,
                          int64_t count, Stream stream) {
  if (count == 0) return;
  launch(masked_whiten_kernel, {dim3(static_cast<unsigned>(ceil_div(count, kSumThreads))), dim3(kSumThreads)}, stream,
         x, mask, moments, shift_mean, y, count);
}

// ---- PPO ---------------------------------------------------------------------------------------------------------------------

constexpr double kLogRatioLimit = 20.0;  // beyond it the loss is constant rather than infinite

__device__ __forceinline__ double clamped(double x, double low, double high) {
  return x < low ? low : high < x ? high : x;  // a NaN stays
}

// e^d - 1 - d without cancellation: near 0 by its series. (expm1 is a call that costs a stack frame.)
__device__ __forceinline__ double exp_beyond_tangent(double d, double exp_d) {
  if (!(fabs(d) < 0.5)) return exp_d - 1.0 - d;
  double sum = 1.0;
#pragma unroll
  for (int k = 16; k >= 3; --k) sum = fma(sum, d * (1.0 / k), 1.0);
  return 0.5 * d * d * sum;
}

// max(-A r, -A clip(r)); for A < 0 optionally no more than -c A. Where a constant branch wins the gradient is 0.
struct PolicyTerm {
  static constexpr int kTerms = 1 + kPolicyStats;
  static constexpr bool kLastIsMax = true;  // ratio_max
  PolicyLossArgs p;
  __device__ void add(int64_t i, Sums<kTerms>& total) const {
    p.grad[i] = 0.0f;
    if (!p.mask[i]) return;
    const double difference = static_cast<double>(p.logprob[i]) - p.old_logprob[i];
    const double d = clamped(difference, -kLogRatioLimit, kLogRatioLimit);
    const double ratio = exp(d), advantage = p.advantages[i];
    const double plain = -advantage * ratio;
    const double bounded = -advantage * clamped(ratio, 1.0 - p.clip_low, 1.0 + p.clip_high);
    const bool clipped = bounded > plain;
    double loss = clipped ? bounded : plain;
    double grad = clipped || fabs(difference) > kLogRatioLimit ? 0.0 : plain;
    const double ceiling = -advantage * p.dual_clip;
    if (p.dual_clip > 0.0 && advantage < 0.0 && loss > ceiling) {
      loss = ceiling;
      grad = 0.0;
    }
    p.grad[i] = static_cast<float>(grad);
    const Sums<kTerms> token = {loss,        1.0,           double(clipped && ratio < 1.0), double(clipped && ratio > 1.0),
                                0.5 * d * d, exp_beyond_tangent(d, ratio), ratio,                           ratio};
    JoinSums<kTerms, kLastIsMax>::into(total, token);
  }
};

struct ValueTerm {
  static constexpr int kTerms = 1 + kValueStats;
  static constexpr bool kLastIsMax = false;
  ValueLossArgs p;
  __device__ void add(int64_t i, Sums<kTerms>& total) const {
    p.grad[i] = 0.0f;
    if (!p.mask[i]) return;
    const double value = p.values[i], old_value = p.old_values[i], target = p.returns[i];
    const double bounded = clamped(value, old_value - p.clip, old_value + p.clip);
    const double plain_square = (value - target) * (value - target);
    const double bounded_square = (bounded - target) * (bounded - target);
    const bool clipped = bounded_square > plain_square;
    const double error = target - value;
    p.grad[i] = clipped ? 0.0f : static_cast<float>(value - target);
    const Sums<kTerms> token = {0.5 * (clipped ? bounded_square : plain_square),
                                1.0,
                                double(clipped),
                                error,
                                error * error,
                                target,
                                target * target};
    JoinSums<kTerms, kLastIsMax>::into(total, token);
  }
};

template <int kTerms>
struct StoreLoss {
  double* loss;
  double* stats;
  __device__ void operator()(const Sums<kTerms>& total) const {
    *loss = total.value[0];
#pragma unroll
    for (int k = 1; k < kTerms; ++k) stats[k - 1] = total.value[k];
  }
};

void ppo_policy_loss(const PolicyLossArgs& p, double* loss, double* stats, double* partial, Stream stream) {
  sum_terms(PolicyTerm{p}, p.count, kRlhfChunk, partial, StoreLoss<PolicyTerm::kTerms>{loss, stats}, stream);
}
void ppo_value_loss(const ValueLossArgs& p, double* loss, double* stats, double* partial, Stream stream) {
  sum_terms(ValueTerm{p}, p.count, kRlhfChunk, partial, StoreLoss<ValueTerm::kTerms>{loss, stats}, stream);
}

}  // namespace hybrid::cuda
