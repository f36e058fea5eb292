// What the attention kernels share: scratch, and the scores that a row may see. For *.simd.cpp files only.
#pragma once
#include "attention/attention.h"
#include "common/vec.h"
#include "linear/tile.h"

namespace hybrid::HYBRID_ISA {

inline int64_t round_up(int64_t n) { return ceil_div(n, Vec::width) * Vec::width; }

// Bump allocation from the thread's scratch.
struct Carve {
  float* next;
  float* take(int64_t floats) {
    float* taken = next;
    next += ceil_div(floats, 16) * 16;
    return taken;
  }
};

// The lanes of a vector of keys that lie in [low, high).
inline Vec::Mask in_range(int64_t first_key, int64_t low, int64_t high) {
  Vec::Int key;
  for (int i = 0; i < kVecWidth; ++i) key[i] = i;
  key += static_cast<int32_t>(first_key);
  return (key >= static_cast<int32_t>(low)) & (key < static_cast<int32_t>(high));
}

// Scores as softmax sees them: q k * scale, and with ALiBi slope * (key - query), here for the keys from `distance` on.
inline Vec scaled_scores(const float* products, float scale, bool alibi, float slope, int64_t distance) {
  const Vec x = Vec::load(products) * scale;
  if (!alibi) return x;
  Vec away;
  for (int i = 0; i < kVecWidth; ++i) away.v[i] = static_cast<float>(distance + i);
  return fma(away, slope, x);
}

// The keys of a tile that a query sees: [low, high), counted from the tile's first key; `at` is the query's own place.
struct Visible {
  int64_t low, high;
};
inline Visible visible_keys(int64_t at, int64_t count, int64_t window) {
  return {window > 0 ? larger(0, at - window + 1) : 0, smaller(count, at + 1)};
}

}  // namespace hybrid::HYBRID_ISA
