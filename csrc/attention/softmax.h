// The softmax of attention: over one key tile, and from tile to tile. For *.simd.cpp files only.
//
// A tile is done relative to its own maximum, so that it is the same whatever was seen before: tiles may be done in any order by
// any thread, and are then merged in theirs. That is the one order of training, prefill and decode, split or not.
#pragma once
#include <math.h>

#include "attention/rows.h"
#include "common/math.h"
#include "common/vec.h"

namespace hybrid::HYBRID_ISA {

struct TileSoftmax {
  float max = -INFINITY;
  float mass = 0.0f;  // sum of exp(score - max)
};

// How scores are made of products.
struct Scoring {
  float scale;
  bool alibi;
  float slope;
};

// One row's products with the first `keys` keys of a tile (scores[64]) become probabilities before division by their sum, in
// place; zero where the row, at place `at`, does not see the key. It must see one.
inline TileSoftmax softmax_tile(float* scores, int64_t keys, int64_t at, Visible see, const Scoring& scoring) {
  const int64_t end = ceil_div(see.high, Vec::width) * Vec::width;
  for (int64_t key = end; key < keys; key += Vec::width) Vec().store(scores + key);
  Vec top(-INFINITY);
  for (int64_t key = 0; key < end; key += Vec::width) {
    Vec x = scaled_scores(scores + key, scoring.scale, scoring.alibi, scoring.slope, key - at);
    if (key < see.low || key + Vec::width > see.high) x = select(in_range(key, see.low, see.high), x, Vec(-INFINITY));
    x.store(scores + key);
    top = max(top, x);
  }
  const float tile_max = reduce_max(top);
  const float base = tile_max == -INFINITY ? 0.0f : tile_max;  // all overflowed: probabilities 0 rather than inf - inf
  Vec mass;
  for (int64_t key = 0; key < end; key += Vec::width) {
    const Vec p = exp(Vec::load(scores + key) - base);  // 0 where the score is -infinity
    p.store(scores + key);
    mass += p;
  }
  return {tile_max, reduce_add(mass)};
}

// The softmax of some rows over the tiles so far. merge() takes in one more tile's maxima and masses (-infinity and 0 where a row
// saw no key) and leaves the factors of earlier sums and of the tile's: sum = sum * old + values * fresh.
struct RunningSoftmax {
  float *max, *mass;   // [rows]
  float *old, *fresh;  // [rows]

  void start(int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      max[r] = -INFINITY;
      mass[r] = 0.0f;
    }
  }

  void merge(const float* tile_max, const float* tile_mass, int64_t first, int64_t rows) const {
    const Vec none(-INFINITY);
    for_each_vec(rows, [&](int64_t i, int64_t lanes) {
      const int64_t r = first + i;
      const Vec before = Vec::load(max + r, lanes), tile = Vec::load(tile_max + i, lanes);
      const Vec now = hybrid::HYBRID_ISA::max(before, tile);
      const Vec was = exp(select(now > none, before - now, Vec())), is = exp(select(now > none, tile - now, Vec()));
      now.store(max + r, lanes);
      fma(Vec::load(mass + r, lanes), was, Vec::load(tile_mass + i, lanes) * is).store(mass + r, lanes);
      was.store(old + r, lanes);
      is.store(fresh + r, lanes);
    });
  }

  // Row r's sums, `width` floats in whole vectors, with the tile's products of probabilities and values.
  void add(int64_t r, float* sum, const float* values, int64_t width) const {
    const Vec before(old[r]), now(fresh[r]);
    for (int64_t c = 0; c < width; c += Vec::width) {
      fma(Vec::load(sum + c), before, Vec::load(values + c) * now).store(sum + c);
    }
  }
};

}  // namespace hybrid::HYBRID_ISA
