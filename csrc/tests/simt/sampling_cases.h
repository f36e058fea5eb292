// What the sampling tests share: a row's distribution in fp64, and as torch.log_softmax has it.
#pragma once
#include "tests/simt/harness.h"

namespace hybrid::testing {

template <typename T>
std::vector<double> row_of(const Buffer<T>& logits, int64_t row, int64_t vocab) {
  std::vector<double> out;
  for (int64_t i = 0; i < vocab; ++i) out.push_back(to_float(logits[row * vocab + i]));
  return out;
}

struct Distribution {
  double max, sum, entropy, log_sum, temperature;
  std::vector<double> weights;
  double logprob(double logit) const { return (logit - max) / temperature - log_sum; }
};

// Over the logits from `least` on. With Plain<float>, as torch.log_softmax does it.
template <typename Mode>
Distribution distribution(const std::vector<double>& row, double temperature, double least = -INFINITY) {
  using Real = typename Mode::Real;
  const double max = *std::max_element(row.begin(), row.end());
  std::vector<double> weights;
  Real sum = 0, weighted = 0;
  for (const double x : row) {
    const Real e = (Real(x) - Real(max)) / Real(temperature), w = x < least ? Real(0) : std::exp(e);
    weights.push_back(w);
    sum += w;
    if (w > 0) weighted += w * e;
  }
  const Real log_sum = std::log(sum);
  return {max, sum, log_sum - weighted / sum, log_sum, temperature, weights};
}

template <typename Mode>
double scored(const Distribution& d, double logit) {
  using Real = typename Mode::Real;
  return (Real(logit) - Real(d.max)) / Real(d.temperature) - Real(d.log_sum);
}

}  // namespace hybrid::testing
