// Advantages, whitening and PPO losses on a GPU: the formulas and argument structs of rlhf.h, with pointers to device memory and
// results left there. All sums run in double, over chunks of kRlhfChunk tokens and then over the chunks.
#pragma once
#include "rlhf/rlhf.h"

namespace hybrid::cuda {

constexpr int64_t kRlhfChunk = 4096;
constexpr int64_t rlhf_chunks(int64_t count) { return (count + kRlhfChunk - 1) / kRlhfChunk; }

void gae(const GaeArgs& args, void* stream);

// moments [3]: count, mean, sum of squared deviations. partial: scratch [rlhf_chunks(count), 2].
void masked_moments(const float* x, const bool* mask, int64_t count, double* moments, double* partial, void* stream);
void masked_whiten(const float* x, const bool* mask, const double* moments, bool shift_mean, float* y, int64_t count,
                   void* stream);

constexpr int kPolicyStats = 7;  // those of PolicyLoss after its loss, in order
constexpr int kValueStats = 6;   // those of ValueLoss
// loss [1], stats [kPolicyStats or kValueStats]. partial: scratch [rlhf_chunks(count), 1 + that number].
void ppo_policy_loss(const PolicyLossArgs& args, double* loss, double* stats, double* partial, void* stream);
void ppo_value_loss(const ValueLossArgs& args, double* loss, double* stats, double* partial, void* stream);

}  // namespace hybrid::cuda
