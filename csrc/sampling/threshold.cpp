#include "sampling/threshold.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <limits>

namespace hybrid {
namespace {

constexpr int kBinBits = 10;
constexpr int64_t kBins = int64_t{1} << kBinBits;

struct KeyRange {
  uint32_t low, high;  // inclusive
};

KeyRange range_of(std::span<const Candidate> candidates) {
  KeyRange range{std::numeric_limits<uint32_t>::max(), 0};
  for (const Candidate& c : candidates) range = {std::min(range.low, c.key), std::max(range.high, c.key)};
  return range;
}

// Each round cuts the range of the candidates' keys into at most 1024 equal bins, adds the bins up from the top, and
// goes on with the candidates of the bin where the sum reaches `wanted`: at most four rounds for 32-bit keys, the later
// ones over a handful. Bins fill in vocabulary order, so the sums are reproducible.
template <typename Measure>
uint32_t search(std::span<const Candidate> candidates, double wanted, KernelVector<Candidate>& work,
                const Measure& measure) {
  double above = 0.0;  // measure of the keys over the range
  for (;;) {
    const KeyRange range = range_of(candidates);
    const int shift = std::max(0, static_cast<int>(std::bit_width(range.high - range.low)) - kBinBits);
    const auto bin_of = [=](const Candidate& c) { return int64_t{(c.key - range.low) >> shift}; };
    std::array<double, kBins> bins{};
    for (const Candidate& c : candidates) bins[bin_of(c)] += measure(c);
    int64_t bin = bin_of({0, range.high, 0.0f});
    while (bin >= 0 && above + bins[bin] < wanted) above += bins[bin--];
    // Rounding may leave the finer sums an ulp short of what the bin promised: then all of the range is needed.
    if (bin < 0) return range.low;
    if (shift == 0) return range.low + static_cast<uint32_t>(bin);
    if (candidates.data() == work.data()) {
      std::erase_if(work, [&](const Candidate& c) { return bin_of(c) != bin; });
    } else {
      work.clear();
      std::copy_if(candidates.begin(), candidates.end(), std::back_inserter(work),
                   [&](const Candidate& c) { return bin_of(c) == bin; });
    }
    candidates = work;
  }
}

}  // namespace

uint32_t threshold_by_count(std::span<const Candidate> candidates, double wanted, KernelVector<Candidate>& work) {
  return search(candidates, wanted, work, [](const Candidate&) { return 1.0; });
}

uint32_t threshold_by_weight(std::span<const Candidate> candidates, double wanted, KernelVector<Candidate>& work) {
  return search(candidates, wanted, work, [](const Candidate& c) { return static_cast<double>(c.weight); });
}

}  // namespace hybrid
