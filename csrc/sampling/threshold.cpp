#include "sampling/threshold.h"

#include <algorithm>
#include <array>
#include <limits>

namespace hybrid {
namespace {

constexpr int kBinBits = 10;
constexpr int64_t kBins = int64_t{1} << kBinBits;

struct KeyRange {
  uint32_t low, high;  // inclusive
};

// The least and greatest key present within `bounds`.
KeyRange keys_within(const std::vector<Candidate>& candidates, KeyRange bounds) {
  KeyRange range{bounds.high, bounds.low};
  for (const Candidate& c : candidates) {
    if (c.key >= bounds.low && c.key <= bounds.high) range = {std::min(range.low, c.key), std::max(range.high, c.key)};
  }
  return range;
}

// Each round cuts the range into at most 1024 equal bins, adds them up from the top, and goes on inside the bin where the sum
// reaches `wanted`: at most four rounds for 32-bit keys. Bins fill in vocabulary order, so the sums are reproducible.
template <typename Measure>
uint32_t search(const std::vector<Candidate>& candidates, double wanted, const Measure& measure) {
  KeyRange range = keys_within(candidates, {0, std::numeric_limits<uint32_t>::max()});
  double above = 0.0;  // measure of the keys over range.high
  for (;;) {
    const int shift = std::max(0, static_cast<int>(std::bit_width(range.high - range.low)) - kBinBits);
    std::array<double, kBins> bins{};
    for (const Candidate& c : candidates) {
      if (c.key >= range.low && c.key <= range.high) bins[(c.key - range.low) >> shift] += measure(c);
    }
    int64_t bin = (range.high - range.low) >> shift;
    while (bin >= 0 && above + bins[bin] < wanted) above += bins[bin--];
    // Rounding may leave the finer sums an ulp short of what the bin promised: then all of the range is needed.
    if (bin < 0) return range.low;
    const uint32_t low = range.low + (static_cast<uint32_t>(bin) << shift);
    if (shift == 0) return low;
    range = keys_within(candidates, {low, low + ((uint32_t{1} << shift) - 1)});
  }
}

}  // namespace

uint32_t threshold_by_count(const std::vector<Candidate>& candidates, double wanted) {
  return search(candidates, wanted, [](const Candidate&) { return 1.0; });
}

uint32_t threshold_by_weight(const std::vector<Candidate>& candidates, double wanted) {
  return search(candidates, wanted, [](const Candidate& c) { return static_cast<double>(c.weight); });
}

}  // namespace hybrid
