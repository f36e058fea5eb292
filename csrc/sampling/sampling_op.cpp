#include "sampling/sampling.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "common/dims.h"
#include "common/parallel.h"
#include "sampling/row.h"
#include "sampling/tensors.h"

namespace hybrid {
namespace {

using at::Tensor;

// Runs fn(row) over the rows of a [N, V] array, several short rows to a task.
template <typename Fn>
void for_each_row(int64_t rows, int64_t vocab, const Fn& fn) {
  constexpr int64_t kLogitsPerTask = 16384;
  const int64_t per_task = kLogitsPerTask / vocab + 1;
  parallel_for((rows + per_task - 1) / per_task, [&](int64_t task) {
    for (int64_t row = task * per_task; row < std::min(rows, (task + 1) * per_task); ++row) fn(row);
  });
}

ScoreTensors token_logprobs_cpu(const Tensor& logits_, const Tensor& targets_, double temperature,
                                const std::optional<Tensor>& thresholds_) {
  Dims dims("token_logprobs");
  dims.expect(logits_, "logits", {"N", "V"}).expect(targets_, "targets", {"N"}, at::kLong);
  dims.expect(thresholds_, "thresholds", {"N"});
  const int64_t rows = dims["N"], vocab = dims["V"];
  check_vocab("token_logprobs", vocab);
  check_temperature("token_logprobs", temperature);
  const Tensor logits = logits_.contiguous(), targets = targets_.contiguous();
  check_targets("token_logprobs", targets, vocab);
  const Tensor thresholds = thresholds_ ? thresholds_->contiguous() : Tensor();
  const float* threshold = check_thresholds("token_logprobs", thresholds);

  const float* x = logits.const_data_ptr<float>();
  const int64_t* target = targets.const_data_ptr<int64_t>();
  std::vector<RowScore> scores(rows);
  for_each_row(rows, vocab, [&](int64_t i) {
    scores[i] = score_row(x + i * vocab, vocab, target[i], static_cast<float>(temperature),
                          threshold != nullptr ? threshold[i] : -std::numeric_limits<float>::infinity());
  });
  return score_tensors(scores, logits.options());
}

Tensor token_logprobs_backward_cpu(const Tensor& grad_logprob_, const Tensor& grad_entropy_, const Tensor& logits_,
                                   const Tensor& targets_, const Tensor& entropy_, const Tensor& lse_,
                                   const Tensor& thresholds_, double temperature) {
  Dims dims("token_logprobs_backward");
  dims.expect(logits_, "logits", {"N", "V"})
      .expect(targets_, "targets", {"N"}, at::kLong)
      .expect(grad_logprob_, "grad_logprob", {"N"})
      .expect(grad_entropy_, "grad_entropy", {"N"})
      .expect(entropy_, "entropy", {"N"})
      .expect(lse_, "lse", {"N"}, at::kDouble)
      .expect(thresholds_, "thresholds", {"N"});
  const int64_t rows = dims["N"], vocab = dims["V"];
  check_vocab("token_logprobs_backward", vocab);
  check_temperature("token_logprobs_backward", temperature);
  const Tensor logits = logits_.contiguous(), targets = targets_.contiguous();
  const Tensor grad_logprob = grad_logprob_.contiguous(), grad_entropy = grad_entropy_.contiguous();
  const Tensor entropy = entropy_.contiguous(), lse = lse_.contiguous();
  const Tensor thresholds = thresholds_.contiguous();
  check_targets("token_logprobs_backward", targets, vocab);
  Tensor grad = at::empty_like(logits);

  const float* x = logits.const_data_ptr<float>();
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const float *gp = grad_logprob.const_data_ptr<float>(), *gh = grad_entropy.const_data_ptr<float>();
  const float* h = entropy.const_data_ptr<float>();
  const float* threshold = thresholds.const_data_ptr<float>();
  const double* s = lse.const_data_ptr<double>();
  float* out = grad.mutable_data_ptr<float>();
  for_each_row(rows, vocab, [&](int64_t i) {
    score_row_backward({.logits = x + i * vocab,
                        .grad = out + i * vocab,
                        .vocab = vocab,
                        .target = target[i],
                        .temperature = static_cast<float>(temperature),
                        .threshold = threshold[i],
                        .entropy = h[i],
                        .lse = s[i],
                        .grad_logprob = gp[i],
                        .grad_entropy = gh[i]});
  });
  return grad;
}

SampleTensors sample_cpu(const Tensor& logits_, double temperature, int64_t top_k, double top_p, int64_t seed,
                         const Tensor& sample_ids_, const Tensor& positions_) {
  Dims dims("sample");
  dims.expect(logits_, "logits", {"N", "V"})
      .expect(sample_ids_, "sample_ids", {"N"}, at::kLong)
      .expect(positions_, "positions", {"N"}, at::kLong);
  const int64_t rows = dims["N"], vocab = dims["V"];
  check_vocab("sample", vocab);
  const SamplingRule rule = check_rule("sample", temperature, top_k, top_p, seed);
  const Tensor logits = logits_.contiguous(), sample_ids = sample_ids_.contiguous(),
               positions = positions_.contiguous();
  check_positions("sample", positions);

  const float* x = logits.const_data_ptr<float>();
  const int64_t *id = sample_ids.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
  std::vector<Sampled> sampled(rows);
  for_each_row(rows, vocab, [&](int64_t i) {
    sampled[i] =
        sample_row(x + i * vocab, vocab, rule, static_cast<uint64_t>(id[i]), static_cast<uint32_t>(position[i]));
  });
  return sample_tensors("sample", sampled, logits.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CPU, m) {
  m.impl("token_logprobs", token_logprobs_cpu);
  m.impl("token_logprobs_backward", token_logprobs_backward_cpu);
  m.impl("sample", sample_cpu);
}

}  // namespace hybrid
