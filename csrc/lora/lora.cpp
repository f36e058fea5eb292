#include "lora/lora.h"

#include <algorithm>
#include <cmath>

#include "common/parallel.h"
#include "lora/delta.h"

namespace hybrid {

HYBRID_DECLARE_SIMD(void lora_delta_row(const float* a, const float* b, float scale, int64_t R, int64_t K,
                                        float* delta))

void lora_delta_row(const float* a, const float* b, float scale, int64_t R, int64_t K, float* delta) {
  HYBRID_PICK_SIMD(lora_delta_row)(a, b, scale, R, K, delta);
}

namespace {

float to_float(float x) { return x; }
float to_float(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

template <typename Weight>
Weight round_to(float x);
template <>
float round_to<float>(float x) {
  return x;
}
template <>
BFloat16 round_to<BFloat16>(float x) {  // to nearest, ties to even
  if (std::isnan(x)) return {0x7fc0};
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// Bits as integers in the order of the values: neighbouring numbers differ by one, -0 comes just before +0. Its own
// inverse.
int64_t ordered(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x);
  return bits < 0 ? bits ^ INT32_MAX : bits;
}
int64_t ordered(BFloat16 x) {
  const auto bits = static_cast<int16_t>(x.bits);
  return bits < 0 ? bits ^ INT16_MAX : bits;
}
template <typename Weight>
Weight from_ordered(int64_t value);
template <>
float from_ordered<float>(int64_t value) {
  const auto bits = static_cast<int32_t>(value);
  return std::bit_cast<float>(bits < 0 ? bits ^ INT32_MAX : bits);
}
template <>
BFloat16 from_ordered<BFloat16>(int64_t value) {
  return {static_cast<uint16_t>(value < 0 ? value ^ INT16_MAX : value)};
}

// Calls body(row, delta) for every output row; delta [K] is that row of the low-rank product.
template <typename Body>
void for_each_delta_row(const LoraFactors& f, const Body& body) {
  constexpr int64_t kRows = 16;
  parallel_for((f.N + kRows - 1) / kRows, [&](int64_t task) {
    std::vector<float> delta(f.K);
    int64_t split = 0, split_end = f.splits[0];
    for (int64_t n = task * kRows; n < std::min(f.N, (task + 1) * kRows); ++n) {
      while (n >= split_end) split_end += f.splits[++split];
      lora_delta_row(f.a + split * f.R * f.K, f.b + n * f.R, f.scale, f.R, f.K, delta.data());
      body(n, delta.data());
    }
  });
}

template <typename Weight>
bool is_finite(Weight x) {
  return std::isfinite(to_float(x));
}

// The residual of one weight, or false where only an escape restores it.
template <typename Weight>
bool residual_of(Weight base, Weight merged, float delta, int8_t* residual) {
  const Weight near = round_to<Weight>(to_float(merged) - delta);
  if (!is_finite(base) || !is_finite(merged) || !is_finite(near)) return false;
  const int64_t units = ordered(base) - ordered(near);
  if (units < -127 || units > 127) return false;
  *residual = static_cast<int8_t>(units);
  return true;
}

}  // namespace

template <typename Weight>
void lora_merge(const Weight* weight, const LoraFactors& factors, Weight* merged) {
  for_each_delta_row(factors, [&](int64_t n, const float* delta) {
    for (int64_t k = 0; k < factors.K; ++k) {
      const int64_t i = n * factors.K + k;
      merged[i] = round_to<Weight>(to_float(weight[i]) + delta[k]);
    }
  });
}

template <typename Weight>
std::vector<LoraEscape<Weight>> lora_merge_in_place(Weight* weight, const LoraFactors& factors, int8_t* residual) {
  std::vector<std::vector<LoraEscape<Weight>>> row_escapes(factors.N);
  for_each_delta_row(factors, [&](int64_t n, const float* delta) {
    for (int64_t k = 0; k < factors.K; ++k) {
      const int64_t i = n * factors.K + k;
      const Weight base = weight[i];
      weight[i] = round_to<Weight>(to_float(base) + delta[k]);
      residual[i] = 0;
      if (!residual_of(base, weight[i], delta[k], &residual[i])) row_escapes[n].push_back({i, base});
    }
  });
  std::vector<LoraEscape<Weight>> escapes;
  for (const auto& row : row_escapes) escapes.insert(escapes.end(), row.begin(), row.end());
  return escapes;
}

template <typename Weight>
void lora_unmerge_in_place(Weight* weight, const LoraFactors& factors, const int8_t* residual,
                           const int64_t* escape_index, const Weight* escape_value, int64_t escapes) {
  for_each_delta_row(factors, [&](int64_t n, const float* delta) {
    for (int64_t k = 0; k < factors.K; ++k) {
      const int64_t i = n * factors.K + k;
      const Weight near = round_to<Weight>(to_float(weight[i]) - delta[k]);
      weight[i] = from_ordered<Weight>(ordered(near) + residual[i]);
    }
  });
  for (int64_t e = 0; e < escapes; ++e) weight[escape_index[e]] = escape_value[e];
}

template void lora_merge(const float*, const LoraFactors&, float*);
template void lora_merge(const BFloat16*, const LoraFactors&, BFloat16*);
template std::vector<LoraEscape<float>> lora_merge_in_place(float*, const LoraFactors&, int8_t*);
template std::vector<LoraEscape<BFloat16>> lora_merge_in_place(BFloat16*, const LoraFactors&, int8_t*);
template void lora_unmerge_in_place(float*, const LoraFactors&, const int8_t*, const int64_t*, const float*, int64_t);
template void lora_unmerge_in_place(BFloat16*, const LoraFactors&, const int8_t*, const int64_t*, const BFloat16*,
                                    int64_t);

}  // namespace hybrid
