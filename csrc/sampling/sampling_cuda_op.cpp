#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "common/cuda_op.h"
#include "common/dims.h"
#include "sampling/sampling_cuda.h"
#include "sampling/sampling_cuda_op.h"
#include "sampling/tensors.h"

namespace hybrid {
namespace {

using at::Tensor;

// Targets, thresholds, positions and logits stay on the device and are not looked at here: that would wait for the stream.

Tensor floats(const Tensor& like, int64_t rows) { return at::empty({rows}, like.options().dtype(at::kFloat)); }

}  // namespace

ScoreTensors token_logprobs_cuda(const Tensor& logits_, const Tensor& targets_, double temperature,
                                 const std::optional<Tensor>& thresholds_) {
  constexpr const char* kOp = "token_logprobs";
  Dims dims(kOp, at::kCUDA);
  dims.expect(logits_, "logits", {"N", "V"}, logits_.scalar_type())
      .expect(targets_, "targets", {"N"}, at::kLong)
      .expect(thresholds_, "thresholds", {"N"});
  check_vocab(kOp, dims["V"]);
  check_temperature(kOp, temperature);
  const OnDevice here(logits_);
  const Tensor logits = logits_.contiguous(), targets = targets_.contiguous(), thresholds = contiguous(thresholds_);
  const Tensor logprob = floats(logits, dims["N"]), entropy = floats(logits, dims["N"]), threshold = floats(logits, dims["N"]);
  const Tensor lse = at::empty({dims["N"]}, logits.options().dtype(at::kDouble));
  dispatch_float(kOp, logits, [&](auto kind) {
    using T = decltype(kind);
    cuda::token_logprobs<T>({.logits = input<T>(logits),
                             .targets = input<int64_t>(targets),
                             .thresholds = input<float>(thresholds),
                             .logprob = output<float>(logprob),
                             .entropy = output<float>(entropy),
                             .lse = output<double>(lse),
                             .threshold = output<float>(threshold),
                             .rows = dims["N"],
                             .vocab = dims["V"],
                             .temperature = static_cast<float>(temperature)},
                            here.stream);
  });
  return {logprob, entropy, lse, threshold};
}

namespace {

Tensor token_logprobs_backward_cuda(const Tensor& grad_logprob_, const Tensor& grad_entropy_, const Tensor& logits_,
                                    const Tensor& targets_, const Tensor& entropy_, const Tensor& lse_,
                                    const Tensor& thresholds_, double temperature) {
  constexpr const char* kOp = "token_logprobs_backward";
  Dims dims(kOp, at::kCUDA);
  dims.expect(logits_, "logits", {"N", "V"}, logits_.scalar_type())
      .expect(targets_, "targets", {"N"}, at::kLong)
      .expect(grad_logprob_, "grad_logprob", {"N"})
      .expect(grad_entropy_, "grad_entropy", {"N"})
      .expect(entropy_, "entropy", {"N"})
      .expect(lse_, "lse", {"N"}, at::kDouble)
      .expect(thresholds_, "thresholds", {"N"});
  check_vocab(kOp, dims["V"]);
  check_temperature(kOp, temperature);
  const OnDevice here(logits_);
  const Tensor logits = logits_.contiguous(), targets = targets_.contiguous();
  const Tensor grad_logprob = grad_logprob_.contiguous(), grad_entropy = grad_entropy_.contiguous();
  const Tensor entropy = entropy_.contiguous(), lse = lse_.contiguous(), thresholds = thresholds_.contiguous();
  const Tensor grad = at::empty_like(logits);
  dispatch_float(kOp, logits, [&](auto kind) {
    using T = decltype(kind);
    cuda::token_logprobs_backward<T>({.grad_logprob = input<float>(grad_logprob),
                                      .grad_entropy = input<float>(grad_entropy),
                                      .logits = input<T>(logits),
                                      .targets = input<int64_t>(targets),
                                      .entropy = input<float>(entropy),
                                      .lse = input<double>(lse),
                                      .thresholds = input<float>(thresholds),
                                      .grad = output<T>(grad),
                                      .rows = dims["N"],
                                      .vocab = dims["V"],
                                      .temperature = static_cast<float>(temperature)},
                                     here.stream);
  });
  return grad;
}

}  // namespace

SampleTensors sample_cuda(const Tensor& logits_, double temperature, int64_t top_k, double top_p, int64_t seed,
                          const Tensor& sample_ids_, const Tensor& positions_) {
  constexpr const char* kOp = "sample";
  Dims dims(kOp, at::kCUDA);
  dims.expect(logits_, "logits", {"N", "V"}, logits_.scalar_type())
      .expect(sample_ids_, "sample_ids", {"N"}, at::kLong)
      .expect(positions_, "positions", {"N"}, at::kLong);
  check_vocab(kOp, dims["V"]);
  const SamplingRule rule = check_rule(kOp, temperature, top_k, top_p, seed);
  const OnDevice here(logits_);
  const Tensor logits = logits_.contiguous(), ids = sample_ids_.contiguous(), positions = positions_.contiguous();
  const int64_t rows = dims["N"];
  const Tensor token = at::empty({rows}, ids.options()), logprob = floats(logits, rows), entropy = floats(logits, rows);
  const Tensor kept_mass = floats(logits, rows), threshold = floats(logits, rows), kept_logprob = floats(logits, rows);
  dispatch_float(kOp, logits, [&](auto kind) {
    using T = decltype(kind);
    cuda::sample<T>({.logits = input<T>(logits),
                     .rule = rule,
                     .sample_ids = input<int64_t>(ids),
                     .positions = input<int64_t>(positions),
                     .token = output<int64_t>(token),
                     .logprob = output<float>(logprob),
                     .entropy = output<float>(entropy),
                     .kept_mass = output<float>(kept_mass),
                     .threshold = output<float>(threshold),
                     .kept_logprob = output<float>(kept_logprob),
                     .rows = rows,
                     .vocab = dims["V"]},
                    here.stream);
  });
  return {token, logprob, entropy, kept_mass, threshold, kept_logprob};
}

TORCH_LIBRARY_IMPL(hybrid_kernels, CUDA, m) {
  m.impl("token_logprobs", token_logprobs_cuda);
  m.impl("token_logprobs_backward", token_logprobs_backward_cuda);
  m.impl("sample", sample_cuda);
}

}  // namespace hybrid
