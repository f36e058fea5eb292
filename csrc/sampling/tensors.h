// What the operators over logits and those over the head have in common: argument checks, and results as tensors.
#pragma once
#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

#include "sampling/sampling.h"

namespace hybrid {

// Each throws ValueError in the name of the operator `op`.
void check_temperature(const char* op, double temperature);
void check_vocab(const char* op, int64_t vocab);
void check_targets(const char* op, const at::Tensor& targets, int64_t vocab);
void check_positions(const char* op, const at::Tensor& positions);
SamplingRule check_rule(const char* op, double temperature, int64_t top_k, double top_p, int64_t seed);
// The values of a contiguous tensor without NaN; nullptr for an undefined one.
const float* check_thresholds(const char* op, const at::Tensor& thresholds);

using ScoreTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;  // logprob, entropy, lse, threshold
ScoreTensors score_tensors(const std::vector<RowScore>& scores, const at::TensorOptions& options);

// token, logprob, entropy, kept_mass, threshold, kept_logprob. Throws ValueError where a row is no distribution.
using SampleTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
SampleTensors sample_tensors(const char* op, const std::vector<Sampled>& sampled, const at::TensorOptions& options);

}  // namespace hybrid
