#include "sampling/tensors.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <cmath>

namespace hybrid {
namespace {

// One field of every row.
template <typename T, typename Row>
at::Tensor column(const std::vector<Row>& rows, T Row::* field, const at::TensorOptions& options, at::ScalarType dtype) {
  at::Tensor values = at::empty({static_cast<int64_t>(rows.size())}, options.dtype(dtype));
  T* out = values.mutable_data_ptr<T>();
  for (size_t i = 0; i < rows.size(); ++i) out[i] = rows[i].*field;
  return values;
}

}  // namespace

void check_temperature(const char* op, double temperature) {
  TORCH_CHECK_VALUE(std::isfinite(temperature) && static_cast<float>(temperature) >= kMinTemperature, op,
                    ": temperature is ", temperature, "; expected a finite number >= ", kMinTemperature);
}

void check_vocab(const char* op, int64_t vocab) {
  TORCH_CHECK_VALUE(vocab > 0 && vocab <= INT32_MAX, op, ": the vocabulary has V=", vocab,
                    " tokens; expected 1 <= V < 2^31");
}

void check_targets(const char* op, const at::Tensor& targets, int64_t vocab) {
  const int64_t* target = targets.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < targets.numel(); ++i) {
    TORCH_CHECK_VALUE(target[i] >= 0 && target[i] < vocab, op, ": targets[", i, "] is ", target[i],
                      "; expected 0 <= target < V=", vocab);
  }
}

void check_positions(const char* op, const at::Tensor& positions) {
  const int64_t* position = positions.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < positions.numel(); ++i) {
    TORCH_CHECK_VALUE(position[i] >= 0 && position[i] <= UINT32_MAX, op, ": positions[", i, "] is ", position[i],
                      "; expected 0 <= position < 2^32");
  }
}

SamplingRule check_rule(const char* op, double temperature, int64_t top_k, double top_p, int64_t seed) {
  if (temperature != 0.0) check_temperature(op, temperature);
  TORCH_CHECK_VALUE(top_k >= 0, op, ": top_k is ", top_k, "; expected 0 (all) or more");
  TORCH_CHECK_VALUE(top_p > 0.0 && top_p <= 1.0, op, ": top_p is ", top_p, "; expected 0 < top_p <= 1");
  return {static_cast<float>(temperature), top_k, static_cast<float>(top_p), static_cast<uint64_t>(seed)};
}

const float* check_thresholds(const char* op, const at::Tensor& thresholds) {
  if (!thresholds.defined()) return nullptr;
  const float* threshold = thresholds.const_data_ptr<float>();
  for (int64_t i = 0; i < thresholds.numel(); ++i) {
    TORCH_CHECK_VALUE(!std::isnan(threshold[i]), op, ": thresholds[", i, "] is NaN; expected a logit, or -inf for all");
  }
  return threshold;
}

ScoreTensors score_tensors(const std::vector<RowScore>& scores, const at::TensorOptions& options) {
  return {column(scores, &RowScore::logprob, options, at::kFloat), column(scores, &RowScore::entropy, options, at::kFloat),
          column(scores, &RowScore::lse, options, at::kDouble), column(scores, &RowScore::threshold, options, at::kFloat)};
}

SampleTensors sample_tensors(const char* op, const std::vector<Sampled>& sampled, const at::TensorOptions& options) {
  for (size_t i = 0; i < sampled.size(); ++i) {
    TORCH_CHECK_VALUE(sampled[i].token >= 0, op, ": the logits of row ", i,
                      " are no distribution: they hold NaN or +inf, or nothing but -inf");
  }
  return {column(sampled, &Sampled::token, options, at::kLong),
          column(sampled, &Sampled::logprob, options, at::kFloat),
          column(sampled, &Sampled::entropy, options, at::kFloat),
          column(sampled, &Sampled::kept_mass, options, at::kFloat),
          column(sampled, &Sampled::threshold, options, at::kFloat),
          column(sampled, &Sampled::kept_logprob, options, at::kFloat)};
}

}  // namespace hybrid
