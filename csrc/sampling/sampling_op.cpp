#include "sampling/sampling.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/dims.h"
#include "common/parallel.h"
#include "sampling/row.h"

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

void check_temperature(const char* op, double temperature) {
  TORCH_CHECK_VALUE(std::isfinite(temperature) && static_cast<float>(temperature) >= kMinTemperature, op,
                    ": temperature is ", temperature, "; expected a finite number >= ", kMinTemperature);
}

void check_vocab(const char* op, const Dims& dims) {
  TORCH_CHECK_VALUE(dims["V"] > 0 && dims["V"] <= INT32_MAX, op, ": logits has V=", dims["V"],
                    "; expected 1 <= V < 2^31");
}

void check_targets(const char* op, const Tensor& targets, int64_t vocab) {
  const int64_t* target = targets.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < targets.numel(); ++i) {
    TORCH_CHECK_VALUE(target[i] >= 0 && target[i] < vocab, op, ": targets[", i, "] is ", target[i],
                      "; expected 0 <= target < V=", vocab);
  }
}

std::tuple<Tensor, Tensor, Tensor> token_logprobs_cpu(const Tensor& logits_, const Tensor& targets_,
                                                      double temperature) {
  Dims dims("token_logprobs");
  dims.expect(logits_, "logits", {"N", "V"}).expect(targets_, "targets", {"N"}, at::kLong);
  const int64_t rows = dims["N"], vocab = dims["V"];
  check_vocab("token_logprobs", dims);
  check_temperature("token_logprobs", temperature);
  const Tensor logits = logits_.contiguous(), targets = targets_.contiguous();
  check_targets("token_logprobs", targets, vocab);
  Tensor logprob = at::empty({rows}, logits.options()), entropy = at::empty_like(logprob);
  Tensor lse = at::empty({rows}, logits.options().dtype(at::kDouble));

  const float* x = logits.const_data_ptr<float>();
  const int64_t* target = targets.const_data_ptr<int64_t>();
  float *p = logprob.mutable_data_ptr<float>(), *h = entropy.mutable_data_ptr<float>();
  double* s = lse.mutable_data_ptr<double>();
  for_each_row(rows, vocab, [&](int64_t i) {
    const RowScore score = score_row(x + i * vocab, vocab, target[i], static_cast<float>(temperature));
    p[i] = score.logprob;
    h[i] = score.entropy;
    s[i] = score.lse;
  });
  return {logprob, entropy, lse};
}

Tensor token_logprobs_backward_cpu(const Tensor& grad_logprob_, const Tensor& grad_entropy_, const Tensor& logits_,
                                   const Tensor& targets_, const Tensor& entropy_, const Tensor& lse_,
                                   double temperature) {
  Dims dims("token_logprobs_backward");
  dims.expect(logits_, "logits", {"N", "V"})
      .expect(targets_, "targets", {"N"}, at::kLong)
      .expect(grad_logprob_, "grad_logprob", {"N"})
      .expect(grad_entropy_, "grad_entropy", {"N"})
      .expect(entropy_, "entropy", {"N"})
      .expect(lse_, "lse", {"N"}, at::kDouble);
  const int64_t rows = dims["N"], vocab = dims["V"];
  check_vocab("token_logprobs_backward", dims);
  check_temperature("token_logprobs_backward", temperature);
  const Tensor logits = logits_.contiguous(), targets = targets_.contiguous();
  const Tensor grad_logprob = grad_logprob_.contiguous(), grad_entropy = grad_entropy_.contiguous();
  const Tensor entropy = entropy_.contiguous(), lse = lse_.contiguous();
  check_targets("token_logprobs_backward", targets, vocab);
  Tensor grad = at::empty_like(logits);

  const float* x = logits.const_data_ptr<float>();
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const float *gp = grad_logprob.const_data_ptr<float>(), *gh = grad_entropy.const_data_ptr<float>();
  const float* h = entropy.const_data_ptr<float>();
  const double* s = lse.const_data_ptr<double>();
  float* out = grad.mutable_data_ptr<float>();
  for_each_row(rows, vocab, [&](int64_t i) {
    score_row_backward({.logits = x + i * vocab,
                        .grad = out + i * vocab,
                        .vocab = vocab,
                        .target = target[i],
                        .temperature = static_cast<float>(temperature),
                        .entropy = h[i],
                        .lse = s[i],
                        .grad_logprob = gp[i],
                        .grad_entropy = gh[i]});
  });
  return grad;
}

void check_positions(const Tensor& positions) {
  const int64_t* position = positions.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < positions.numel(); ++i) {
    TORCH_CHECK_VALUE(position[i] >= 0 && position[i] <= UINT32_MAX, "sample: positions[", i, "] is ", position[i],
                      "; expected 0 <= position < 2^32");
  }
}

SamplingRule check_rule(double temperature, int64_t top_k, double top_p, int64_t seed) {
  if (temperature != 0.0) check_temperature("sample", temperature);
  TORCH_CHECK_VALUE(top_k >= 0, "sample: top_k is ", top_k, "; expected 0 (all) or more");
  TORCH_CHECK_VALUE(top_p > 0.0 && top_p <= 1.0, "sample: top_p is ", top_p, "; expected 0 < top_p <= 1");
  return {static_cast<float>(temperature), top_k, static_cast<float>(top_p), static_cast<uint64_t>(seed)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sample_cpu(const Tensor& logits_, double temperature, int64_t top_k,
                                                              double top_p, int64_t seed, const Tensor& sample_ids_,
                                                              const Tensor& positions_) {
  Dims dims("sample");
  dims.expect(logits_, "logits", {"N", "V"})
      .expect(sample_ids_, "sample_ids", {"N"}, at::kLong)
      .expect(positions_, "positions", {"N"}, at::kLong);
  const int64_t rows = dims["N"], vocab = dims["V"];
  check_vocab("sample", dims);
  const SamplingRule rule = check_rule(temperature, top_k, top_p, seed);
  const Tensor logits = logits_.contiguous(), sample_ids = sample_ids_.contiguous(),
               positions = positions_.contiguous();
  check_positions(positions);
  Tensor token = at::empty({rows}, sample_ids.options()), logprob = at::empty({rows}, logits.options());
  Tensor entropy = at::empty_like(logprob), kept_mass = at::empty_like(logprob), threshold = at::empty_like(logprob);

  const float* x = logits.const_data_ptr<float>();
  const int64_t *id = sample_ids.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
  int64_t* t = token.mutable_data_ptr<int64_t>();
  float *p = logprob.mutable_data_ptr<float>(), *h = entropy.mutable_data_ptr<float>();
  float *mass = kept_mass.mutable_data_ptr<float>(), *least = threshold.mutable_data_ptr<float>();
  for_each_row(rows, vocab, [&](int64_t i) {
    const Sampled sampled =
        sample_row(x + i * vocab, vocab, rule, static_cast<uint64_t>(id[i]), static_cast<uint32_t>(position[i]));
    t[i] = sampled.token;
    p[i] = sampled.logprob;
    h[i] = sampled.entropy;
    mass[i] = sampled.kept_mass;
    least[i] = sampled.threshold;
  });
  for (int64_t i = 0; i < rows; ++i) {
    TORCH_CHECK_VALUE(t[i] >= 0, "sample: logits[", i,
                      "] is no distribution: it holds NaN or +inf, or nothing but -inf");
  }
  return {token, logprob, entropy, kept_mass, threshold};
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CPU, m) {
  m.impl("token_logprobs", token_logprobs_cpu);
  m.impl("token_logprobs_backward", token_logprobs_backward_cpu);
  m.impl("sample", sample_cpu);
}

}  // namespace hybrid
