// Four vectors of the row at a time stay in registers over all R, so that A is read once from the cache and delta
// written once.
#include "lora/delta.h"
#include "common/vec.h"

namespace hybrid::HYBRID_ISA {

void lora_delta_row(const float* a, const float* b, float scale, int64_t R, int64_t K, float* delta) {
  constexpr int64_t kTile = 4 * Vec::width;
  int64_t k = 0;
  for (; k + kTile <= K; k += kTile) {
    Vec sum[4];
    for (int64_t r = 0; r < R; ++r) {
      const float* row = a + r * K + k;
      for (int64_t i = 0; i < 4; ++i) sum[i] = fma(Vec(b[r]), Vec::load(row + i * Vec::width), sum[i]);
    }
    for (int64_t i = 0; i < 4; ++i) (sum[i] * Vec(scale)).store(delta + k + i * Vec::width);
  }
  for_each_vec(K - k, [&](int64_t i, int64_t lanes) {
    Vec sum;
    for (int64_t r = 0; r < R; ++r) sum = fma(Vec(b[r]), Vec::load(a + r * K + k + i, lanes), sum);
    (sum * Vec(scale)).store(delta + k + i, lanes);
  });
}

}  // namespace hybrid::HYBRID_ISA
