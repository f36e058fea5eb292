#include <algorithm>
#include <cmath>

#include "rlhf/chunks.h"
#include "rlhf/rlhf.h"

namespace hybrid {
namespace {

constexpr double kVarianceEps = 1e-8;

struct Count {
  double count = 0.0, sum = 0.0;
  Count& operator+=(const Count& other) {
    count += other.count;
    sum += other.sum;
    return *this;
  }
};

}  // namespace

Moments masked_moments(const float* x, const bool* mask, int64_t count) {
  const auto kept = sum_chunks<Count>(count, [&](int64_t begin, int64_t end, Count& partial) {
    for (int64_t i = begin; i < end; ++i) {
      if (mask[i]) partial += Count{1.0, x[i]};
    }
  });
  if (kept.count == 0.0) return {0.0, 0.0, 0.0};
  const double mean = kept.sum / kept.count;
  const auto squares = sum_chunks<double>(count, [&](int64_t begin, int64_t end, double& partial) {
    for (int64_t i = begin; i < end; ++i) {
      if (mask[i]) partial += (x[i] - mean) * (x[i] - mean);
    }
  });
  return {kept.count, mean, squares};
}

void masked_whiten(const float* x, const bool* mask, const Moments& moments, bool shift_mean, float* y, int64_t count) {
  const double variance = moments.squares / std::max(moments.count - 1.0, 1.0);  // Bessel's
  const double scale = 1.0 / std::sqrt(variance + kVarianceEps);
  const double restored = shift_mean ? 0.0 : moments.mean;
  for (int64_t i = 0; i < count; ++i) {
    y[i] = mask[i] ? static_cast<float>((x[i] - moments.mean) * scale + restored) : 0.0f;
  }
}

}  // namespace hybrid
