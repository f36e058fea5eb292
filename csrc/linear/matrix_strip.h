// The matrix unit's sums of a single row of x, on the vector units. The unit would have hardly anything to do, and waiting for it
// would interrupt the stream of weights, which is all the work. The same bits: its order of sums (matrix_unit.h), its fused
// multiply and add, its zeros for subnormal numbers.
#pragma once
#include "common/parallel.h"
#include "linear/finish.h"
#include "linear/matrix_factors.h"
#include "linear/scratch.h"

namespace hybrid::HYBRID_ISA {

// While one lives, subnormal factors and results are zeros, as in the unit.
class SubnormalsAreZero {
 public:
  SubnormalsAreZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kFlushResults | kFlushFactors); }
  ~SubnormalsAreZero() { _mm_setcsr(before_); }
  SubnormalsAreZero(const SubnormalsAreZero&) = delete;
  SubnormalsAreZero& operator=(const SubnormalsAreZero&) = delete;

 private:
  static constexpr unsigned kFlushResults = 0x8000, kFlushFactors = 0x0040;
  unsigned before_;
};

// Element i of a half of a step, of 16 weight rows that lie across the lanes.
template <typename Element>
inline Vec weight_column(const Vec (&lanes)[kTile], int half, int i) {
  if constexpr (kPerLane<Element> == 1) return lanes[i];
  return widened<Element>(lanes[(half * kTile + i) / 2], i % 2);
}

// Products of kTile weight rows from `row` on, a lane each, with x over steps [first, end). x: its parts as floats, padded_depth
// apart. The lines that `ahead` names are fetched meanwhile.
template <typename Element>
[[gnu::noinline]] Vec strip_sums(const RowsOf<Element>& weights, int64_t row, int64_t first, int64_t end, const float* x,
                                 int64_t padded_depth, Ahead ahead) {
  constexpr int kFirst = kPartsOf<Element> == kParts ? 0 : 3;
  alignas(64) Element padded[kTile * kStep];
  const SubnormalsAreZero mode;
  Vec total;
  for (int64_t step = first; step < end; ++step) {
    const StepRows<Element> rows = weights.step(row, step * kStep, kTile, padded);
    Vec lanes[kTile], chains[2][6];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      if (half == 0 || kPerLane<Element> == 1) load_transposed(rows.base + half * kTile, rows.stride, lanes);
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) {
        ahead.fetch<kTile>();
        const Vec weight = weight_column<Element>(lanes, half, i), large = leading(weight), rest = weight - large;
        const Vec middle = leading(rest), parts[kParts] = {large, middle, rest - middle};
        const float* const factor = x + step * kStep + half * kTile + i;
#pragma GCC unroll 6
        for (int p = kFirst; p < 6; ++p) {
          chains[half][p] = fma(parts[kProducts[p].left], Vec(factor[kProducts[p].right * padded_depth]), chains[half][p]);
        }
      }
    }
#pragma GCC unroll 6
    for (int p = kFirst; p < 6; ++p) total += chains[0][p] + chains[1][p];
  }
  return total;
}

// y = x w^T for one row of x.
template <typename Element>
void linear_row(const LinearArgs& args, const RowsOf<Element>& weights) {
  const int64_t steps = steps_of(args.K), padded_depth = steps * kStep, strips = ceil_div(args.N, kTile);
  const auto split_x = [&] {
    float* const parts = thread_scratch(ScratchSlot::kLinear, kParts * padded_depth);
    for (int64_t k = 0; k < padded_depth; k += Vec::width) {
      Vec split[kParts];
      split_rounded(k < args.K ? Vec::load(args.x + k, smaller(Vec::width, args.K - k)) : Vec(), split);
      for (int i = 0; i < kParts; ++i) split[i].store(parts + i * padded_depth + k);
    }
    return parts;
  };
  const int64_t shares = smaller(smaller(shares_worthwhile(args.N, steps, 1), strips), thread_count());
  parallel_walk(strips, shares, split_x, [&](const float* parts, int64_t i, int64_t last) {
    const int64_t col = i * kTile;
    const Ahead ahead = weights.ahead(i + 1 < last ? col + kTile : args.N);
    const auto chain = [&](int64_t first) {
      const int64_t end = smaller(steps, first + kChainSteps);
      return strip_sums(weights, col, first, end, parts, padded_depth, ahead.after(first * kStep * kTile));
    };
    Vec sums = chain(0);
    for (int64_t first = kChainSteps; first < steps; first += kChainSteps) sums += chain(first);
    finish(args, sums, 0, col, smaller(kTile, args.N - col));
  });
}

}  // namespace hybrid::HYBRID_ISA
