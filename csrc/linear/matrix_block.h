// The inner loops of a product on the matrix unit: a group of rows of the left factor against a pair of column tiles of the right.
//
// The unit takes 16 cycles for a multiplication of tiles, 24 of which make a step of both; splitting the next step's rows takes
// some 230 cycles of the vector units. The two are interleaved instruction by instruction, so that the processor's window always
// holds work for both.
//
// What the loops hold of a step they hold in values, not in members of something: as far as the compiler knows, the unit's
// instructions write any memory, so that a member would be loaded again after each.
#pragma once
#include "linear/matrix_factors.h"

namespace hybrid::HYBRID_ISA {

// A group is two tiles of rows of the left factor: with a pair of column tiles their sums fill the sum registers.
inline constexpr int64_t kGroupRows = 2 * kTile;
template <typename Element>
inline constexpr int64_t kLeftStepFloats = kPartsOf<Element> * 2 * kTileWords;  // of a step of a group

// A pointer whose value GCC cannot foresee. Otherwise it computes all addresses that a loop will use beforehand, and spills them.
template <typename T>
[[gnu::always_inline]] inline void keep_in_register(T*& p) {
  asm("" : "+r"(p));
}

inline void prefetch_to_write(const float* p) { asm volatile("prefetchw (%0)" ::"r"(p)); }

// A step that is being split, some rows at a time, in order. The place of the step after it is brought to L1 meanwhile: the stores
// would wait there for lines that the right factor has driven out.
template <typename Element>
struct Splitting {
  const Element* row;
  int64_t stride;
  float *tiles, *tiles_after;

  template <int kFirst, int kEnd>
  [[gnu::always_inline]] void split() {
#pragma GCC unroll 32
    for (int r = kFirst; r < kEnd; ++r) {
      split_row(row, tiles + r * kTile, 2 * kTileWords);
#pragma GCC unroll 3
      for (int i = 0; i < kPartsOf<Element>; ++i) prefetch_to_write(tiles_after + r * kTile + i * 2 * kTileWords);
      row += stride;
      keep_in_register(row);
    }
  }
};
struct NoSplitting {
  template <int kFirst, int kEnd>
  void split() {}
};

// The tiles of a thread's groups of the left factor, one group after the other, in a ring of some steps.
template <typename Left>
class LeftTiles {
 public:
  using Element = typename Left::Element;
  static int64_t floats(int64_t ring_steps) { return kPaddedFloats + ring_steps * kStepFloats; }

  // memory: floats(ring_steps), aligned to 64 bytes.
  LeftTiles(const Left& left, int64_t steps, int64_t ring_steps, float* memory)
      : left_(left), steps_(steps), padded_(memory), ring_(memory + kPaddedFloats), end_(ring_ + ring_steps * kStepFloats),
        first_(ring_) {}

  // Goes on to the group that begins at `row`; the one after it will probably begin at `next_row`.
  void enter(int64_t row, int64_t next_row) {
    row_ = row;
    if (next_row_ != row) splitting(0, first_).template split<0, kGroupRows>();
    next_row_ = next_row;
  }
  // Goes on behind the group's last step.
  void leave(float* after_last) { first_ = after_last; }

  float* first() const { return first_; }  // the group's first step
  float* next(float* step) const { return step + kStepFloats == end_ ? ring_ : step + kStepFloats; }

  // Of a step of this group; as one past its last, of the next group's first.
  Splitting<Element> splitting(int64_t step, float* tiles) const {
    const StepRows<Element> rows =
        step < steps_ ? left_.step(row_, step * kStep, kGroupRows, padded()) : left_.step(next_row_, 0, kGroupRows, padded());
    return {rows.base, rows.stride, tiles, next(tiles)};
  }

 private:
  static constexpr int64_t kStepFloats = kLeftStepFloats<Element>, kPaddedFloats = kGroupRows * kStep;
  Element* padded() const { return reinterpret_cast<Element*>(padded_); }

  const Left& left_;
  int64_t steps_, row_ = 0, next_row_ = -1;
  float *padded_, *ring_, *end_, *first_;
};

// One step of a group with kRight column tiles of the right factor, whose parts lie at right0 and right1. Beside every product of
// parts, kLines lines of 64 bytes from `lines` on are fetched, one by one: of many at once the processor drops some.
template <int kLeftParts, int kRight, int kLines, typename Splitting>
[[gnu::always_inline]] inline void multiply_step(const float* left, const float* right0, const float* right1, Splitting splitting,
                                                 const char* lines) {
  keep_in_register(lines);
  constexpr int kFirst = kLeftParts == kParts ? 0 : 3, kPlaces = 4 * (6 - kFirst);
  const auto beside = [&]<int kPlace>() __attribute__((always_inline)) {
    constexpr int kRow = kGroupRows * kPlace / kPlaces, kRows = kGroupRows * (kPlace + 1) / kPlaces - kRow;
    constexpr int kLine = kLines * kPlace / 4, kCount = kLines * (kPlace + 1) / 4 - kLine;
    const auto row = [&]<int kNow>() __attribute__((always_inline)) {
      if constexpr (kNow < kRows) {
        splitting.template split<kRow + kNow, kRow + kNow + 1>();
#pragma GCC unroll 4
        for (int i = kLine + kCount * kNow / kRows; i < kLine + kCount * (kNow + 1) / kRows; ++i) {
          __builtin_prefetch(lines + 64 * i, 0, 2);
        }
      }
    };
    row.template operator()<0>();
    row.template operator()<1>();
    row.template operator()<2>();
  };
  const auto multiply = [&]<int kProduct>() __attribute__((always_inline)) {
    if constexpr (kProduct >= kFirst) {
      constexpr Product now = kProducts[kProduct], before = kProduct == kFirst ? Product{-1, -1} : kProducts[kProduct - 1];
      if constexpr (now.left != before.left) {
        load_tile<4>(left + 2 * now.left * kTileWords);
        load_tile<5>(left + (2 * now.left + 1) * kTileWords);
      }
      if constexpr (now.right != before.right) {
        load_tile<6>(right0 + now.right * kTileWords);
        if constexpr (kRight == 2) load_tile<7>(right1 + now.right * kTileWords);
      }
      constexpr int kPlace = 4 * (kProduct - kFirst);
      multiply_tiles<0, 4, 6>();
      beside.template operator()<kPlace>();
      if constexpr (kRight == 2) multiply_tiles<1, 4, 7>();
      beside.template operator()<kPlace + 1>();
      multiply_tiles<2, 5, 6>();
      beside.template operator()<kPlace + 2>();
      if constexpr (kRight == 2) multiply_tiles<3, 5, 7>();
      beside.template operator()<kPlace + 3>();
    }
  };
  multiply.template operator()<0>();
  multiply.template operator()<1>();
  multiply.template operator()<2>();
  multiply.template operator()<3>();
  multiply.template operator()<4>();
  multiply.template operator()<5>();
}

// Bytes to be fetched for every step: the first step's, and how far on the next step's lie.
struct Lines {
  const char* at;
  int64_t per_step;
};

// The sums of a block: [kGroupRows, kRight kTile], from zero or, to resume, from what is there.
struct BlockSums {
  float* base;
  int64_t stride;
  bool resume;

  // body(register, tile)
  template <int kRight, typename Body>
  [[gnu::always_inline]] void for_each_tile(const Body& body) const {
    body.template operator()<0>(base);
    if constexpr (kRight == 2) body.template operator()<1>(base + kTile);
    body.template operator()<2>(base + kTile * stride);
    if constexpr (kRight == 2) body.template operator()<3>(base + kTile * stride + kTile);
  }
};

// Steps [first, end) with kRight tiles of columns; the first lies at `now`. While they pass, those up to split_end are split, each
// one step ahead. Returns where step `end` lies.
template <int kRight, int kLines, typename Left>
[[gnu::noinline]] float* multiply_block(const LeftTiles<Left>& left, float* now, int64_t first, int64_t end, int64_t split_end,
                                        const float* right0, const float* right1, Lines lines, const BlockSums& sums) {
  constexpr int kLeftParts = kPartsOf<typename Left::Element>;
  sums.for_each_tile<kRight>([&]<int kRegister>(const float* tile) {
    if (sums.resume) {
      load_tile<kRegister>(tile, 4 * sums.stride);
    } else {
      zero_tile<kRegister>();
    }
  });
  for (int64_t step = first + 1; step <= end; ++step) {
    float* const next = left.next(now);
    if (step < split_end) {
      multiply_step<kLeftParts, kRight, kLines>(now, right0, right1, left.splitting(step, next), lines.at);
    } else {
      multiply_step<kLeftParts, kRight, kLines>(now, right0, right1, NoSplitting{}, lines.at);
    }
    now = next;
    right0 += kPanelStepWords;
    right1 += kPanelStepWords;
    lines.at += lines.per_step;
  }
  sums.for_each_tile<kRight>([&]<int kRegister>(float* tile) { store_tile<kRegister>(tile, sums.stride); });
  return now;
}

}  // namespace hybrid::HYBRID_ISA
