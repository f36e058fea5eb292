#include "sampling/head.h"

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <vector>

#include "common/dims.h"
#include "linear/weight_tensor.h"
#include "sampling/tensors.h"

namespace hybrid {
namespace {

using at::Tensor;

HeadArgs head_args(const Tensor& hidden, const Tensor& weight) {
  return {.x = hidden.const_data_ptr<float>(),
          .ldx = hidden.size(1),
          .weight = weight_of(weight),
          .rows = hidden.size(0),
          .vocab = weight.size(0),
          .width = weight.size(1)};
}

ScoreTensors linear_token_logprobs_cpu(const Tensor& hidden_, const Tensor& weight_, const Tensor& targets_,
                                       double temperature, const std::optional<Tensor>& thresholds_, int64_t) {
  Dims dims("linear_token_logprobs");
  dims.expect(hidden_, "hidden", {"N", "K"}).expect(weight_, "weight", {"V", "K"}, weight_type(weight_));
  dims.expect(targets_, "targets", {"N"}, at::kLong).expect(thresholds_, "thresholds", {"N"});
  check_vocab("linear_token_logprobs", dims["V"]);
  check_temperature("linear_token_logprobs", temperature);
  const Tensor hidden = hidden_.contiguous(), weight = weight_.contiguous(), targets = targets_.contiguous();
  check_targets("linear_token_logprobs", targets, dims["V"]);
  const Tensor thresholds = thresholds_ ? thresholds_->contiguous() : Tensor();

  std::vector<RowScore> scores(dims["N"]);
  score_head({.head = head_args(hidden, weight),
              .targets = targets.const_data_ptr<int64_t>(),
              .thresholds = check_thresholds("linear_token_logprobs", thresholds),
              .temperature = static_cast<float>(temperature)},
             scores.data());
  return score_tensors(scores, hidden.options());
}

SampleTensors linear_sample_cpu(const Tensor& hidden_, const Tensor& weight_, double temperature, int64_t top_k,
                                double top_p, int64_t seed, const Tensor& sample_ids_, const Tensor& positions_) {
  Dims dims("linear_sample");
  dims.expect(hidden_, "hidden", {"N", "K"})
      .expect(weight_, "weight", {"V", "K"}, weight_type(weight_))
      .expect(sample_ids_, "sample_ids", {"N"}, at::kLong)
      .expect(positions_, "positions", {"N"}, at::kLong);
  check_vocab("linear_sample", dims["V"]);
  const SamplingRule rule = check_rule("linear_sample", temperature, top_k, top_p, seed);
  const Tensor hidden = hidden_.contiguous(), weight = weight_.contiguous(), sample_ids = sample_ids_.contiguous(),
               positions = positions_.contiguous();
  check_positions("linear_sample", positions);

  const int64_t rows = dims["N"];
  const int64_t *id = sample_ids.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
  std::vector<HeadSampler::Draw> draws;
  for (int64_t i = 0; i < rows; ++i) {
    draws.push_back({i, static_cast<uint64_t>(id[i]), static_cast<uint32_t>(position[i])});
  }
  std::vector<Sampled> sampled(rows);
  HeadSampler(dims["V"], rows).draw(head_args(hidden, weight), rule, draws, sampled.data());
  return sample_tensors("linear_sample", sampled, hidden.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CPU, m) {
  m.impl("linear_token_logprobs", linear_token_logprobs_cpu);
  m.impl("linear_sample", linear_sample_cpu);
}

}  // namespace hybrid
