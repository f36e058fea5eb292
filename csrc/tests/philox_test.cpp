// Philox4x32-10 against the known answers that its authors publish with Random123 (kat_vectors), and the range of its uniforms.
#include "common/philox.h"

#include "tests/check.h"

using hybrid::testing::expect;

int main() {
  // Counter words are (position, stream, sample low, sample high); key words are the seed, low first.
  const hybrid::Philox4 zeros = hybrid::philox(0, 0, 0, 0);
  const uint32_t expected_zeros[] = {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u};
  for (int i = 0; i < 4; ++i) expect(zeros.word[i] == expected_zeros[i], "counter 0, key 0");

  const hybrid::Philox4 ones = hybrid::philox(~uint64_t{0}, ~uint64_t{0}, ~0u, ~0u);
  const uint32_t expected_ones[] = {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu};
  for (int i = 0; i < 4; ++i) expect(ones.word[i] == expected_ones[i], "all bits set");

  double sum = 0;
  for (uint32_t position = 0; position < 100000; ++position) {
    const hybrid::Philox4 random = hybrid::philox(7, 11, position, 0);
    for (int which : {0, 1}) {
      const double u = hybrid::uniform_of(random, which);
      expect(u > 0.0 && u < 1.0, "uniform outside (0, 1)");
      sum += u / 2;
    }
  }
  // The mean of 2e5 uniforms has standard deviation 0.00065; seven of them.
  expect(sum / 1e5 > 0.4954 && sum / 1e5 < 0.5046, "mean of uniforms");
  return hybrid::testing::finish();
}
