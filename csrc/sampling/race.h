// How a token is drawn: a race of exponential clocks, in two rounds. Internal to csrc/sampling.
//
// A clock of rate w rings at -log(u) / w, and the first of many to ring is number i with probability w_i / sum of w: an
// exact draw. The uniforms belong to the blocks and tokens of the vocabulary, not to places on a cumulative sum, so a
// small change of the distribution rarely changes the winner: with total variation d between two distributions, one race
// gives another winner with probability at most 2 d / (1 + d). Inverse transform of one uniform has no such bound,
// because every boundary behind a change moves. That is what makes last epoch's response a good draft (docs/design.md).
// Two rounds, blocks and then the winner's tokens, need V / 64 + 64 clocks instead of V.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/philox.h"

namespace hybrid {

// The randomness of one drawn token: uniforms for each block of the vocabulary and for each token, the same whatever the
// logits are.
class RaceUniforms {
 public:
  RaceUniforms() = default;
  HYBRID_HD RaceUniforms(uint64_t seed, uint64_t sample, uint32_t position)
      : seed_(seed), sample_(sample), position_(position) {}
  HYBRID_HD double of_block(int64_t block) { return at(kBlocks, block); }
  HYBRID_HD double of_token(int64_t token) { return at(kTokens, token); }

 private:
  static constexpr uint32_t kBlocks = 0, kTokens = 1u << 31;  // Philox streams; one holds two uniforms

  HYBRID_HD double at(uint32_t kind, int64_t index) {
    const uint32_t stream = kind + static_cast<uint32_t>(index / 2);
    if (!cached_ || stream != stream_) {
      random_ = philox(seed_, sample_, position_, stream);
      stream_ = stream;
      cached_ = true;
    }
    return uniform_of(random_, static_cast<int>(index % 2));
  }

  uint64_t seed_ = 0, sample_ = 0;
  uint32_t position_ = 0, stream_ = 0;
  bool cached_ = false;
  Philox4 random_{};
};

// The first of independent exponential clocks to ring, with these weights for rates: i wins with probability
// weight_i / sum. -1 where no weight is positive.
class Race {
 public:
  HYBRID_HD void enter(int64_t runner, double weight, double uniform) {
    if (!(weight > 0.0)) return;
    const double time = -std::log(uniform) / weight;
    if (winner_ >= 0 && time >= best_) return;
    best_ = time;
    winner_ = runner;
  }
  HYBRID_HD int64_t winner() const { return winner_; }
  HYBRID_HD double time() const { return best_; }  // of the winner

 private:
  int64_t winner_ = -1;
  double best_ = 0.0;
};

}  // namespace hybrid
