// Top-k and top-p as a search for the least logit kept, without sorting the vocabulary. Internal to csrc/sampling.
#pragma once
#include <bit>
#include <cstdint>
#include <span>

#include "common/kernel_memory.h"

namespace hybrid {

// Floats as unsigned integers in the order of their values; -0 and +0 share a key, for they are equal logits.
inline uint32_t ordered_key(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
inline float from_ordered_key(uint32_t key) {
  return std::bit_cast<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

struct Candidate {
  int32_t token;
  uint32_t key;  // ordered_key(logit)
  float weight;  // exp((logit - m) / temperature)
};

// The greatest key whose candidates at or above it count at least `wanted`, or weigh at least `wanted`: an exact answer
// from histograms of ever finer key ranges. If all together fall short, the least key. `candidates` must not be empty;
// `work` is overwritten.
uint32_t threshold_by_count(std::span<const Candidate> candidates, double wanted, KernelVector<Candidate>& work);
uint32_t threshold_by_weight(std::span<const Candidate> candidates, double wanted, KernelVector<Candidate>& work);

}  // namespace hybrid
