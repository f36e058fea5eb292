// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a counter-based generator, so that a
// sample's randomness belongs to the sample and to nothing else.
#pragma once
#include <array>
#include <cstdint>

#if defined(__CUDACC__)
#define HYBRID_HD __host__ __device__
#else
#define HYBRID_HD
#endif

namespace hybrid {

struct Philox4 {
  uint32_t word[4];
};

HYBRID_HD inline Philox4 philox(uint64_t seed, uint64_t sample, uint32_t position, uint32_t stream) {
  uint32_t c0 = position, c1 = stream, c2 = static_cast<uint32_t>(sample), c3 = static_cast<uint32_t>(sample >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// One of two uniform doubles in (0, 1) with 52 random bits: never 0, never 1.
HYBRID_HD inline double uniform_of(const Philox4& random, int which) {
  const uint32_t high = which == 0 ? random.word[0] : random.word[2];  // no index: a GPU has none for registers
  const uint32_t low = which == 0 ? random.word[1] : random.word[3];
  const uint64_t bits = ((uint64_t{high} << 32) | low) >> 12;  // 52 bits
  return (static_cast<double>(bits) + 0.5) * 0x1.0p-52;
}

}  // namespace hybrid
