// Scoring and sampling of logits on a GPU, for the operators that are made of them.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

#include "sampling/tensors.h"

namespace hybrid {

ScoreTensors token_logprobs_cuda(const at::Tensor& logits, const at::Tensor& targets, double temperature,
                                 const std::optional<at::Tensor>& thresholds);
SampleTensors sample_cuda(const at::Tensor& logits, double temperature, int64_t top_k, double top_p, int64_t seed,
                          const at::Tensor& sample_ids, const at::Tensor& positions);

}  // namespace hybrid
