#include "sampling/row.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace hybrid {

HYBRID_DECLARE_SIMD(void block_stats(const float* logits, int64_t count, float temperature, float threshold,
                                     const BlockStats& stats);
                    void block_weights(const float* logits, int64_t count, float max, float temperature,
                                       float* weights);
                    void score_row_backward(const RowGradArgs& args))

void block_stats(const float* logits, int64_t count, float temperature, float threshold, const BlockStats& stats) {
  HYBRID_PICK_SIMD(block_stats)(logits, count, temperature, threshold, stats);
}

void block_weights(const float* logits, int64_t count, float max, float temperature, float* weights) {
  HYBRID_PICK_SIMD(block_weights)(logits, count, max, temperature, weights);
}

void score_row_backward(const RowGradArgs& args) { HYBRID_PICK_SIMD(score_row_backward)(args); }

double block_scale(float block_max, float row_max, float temperature) {
  return std::exp((static_cast<double>(block_max) - row_max) / temperature);
}

RowTotals total_row(const BlockStats& stats, int64_t blocks, float temperature) {
  RowTotals row{-std::numeric_limits<float>::infinity(), 0.0, 0.0};
  for (int64_t b = 0; b < blocks; ++b) row.max = std::max(row.max, stats.max[b]);
  for (int64_t b = 0; b < blocks; ++b) {
    if (stats.weight[b] == 0.0f) continue;  // its maximum may be -inf
    const double difference = (static_cast<double>(stats.max[b]) - row.max) / temperature;
    const double scale = std::exp(difference);
    row.weight += stats.weight[b] * scale;
    row.weighted += (stats.weighted[b] + stats.weight[b] * difference) * scale;
  }
  return row;
}

bool RowTotals::is_distribution() const { return weight > 0.0 && std::isfinite(weight); }

double RowTotals::log_sum_exp(float temperature) const {
  return max / static_cast<double>(temperature) + std::log(weight);
}

double RowTotals::entropy() const {
  const double entropy = std::log(weight) - weighted / weight;
  return entropy < 0.0 ? 0.0 : entropy;  // keeps NaN
}

double RowTotals::logprob(float logit, float temperature) const {
  return (static_cast<double>(logit) - max) / temperature - std::log(weight);
}

}  // namespace hybrid
