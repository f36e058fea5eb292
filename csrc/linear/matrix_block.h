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

// A group is kGroupTiles tiles of rows of the left factor: two, whose sums with a pair of column tiles fill the sum registers, or
// four for a single column tile, since a register's multiplications wait for each other, 52 cycles each.
template <typename Element, int kGroupTiles>
inline constexpr int64_t kLeftStepFloats = kPartsOf<Element> * kGroupTiles * kTileWords;

// A pointer whose value GCC cannot foresee. Otherwise it computes all addresses that a loop will use beforehand, and spills them.
template <typename T>
[[gnu::always_inline]] inline void keep_in_register(T*& p) {
  asm("" : "+r"(p));
}

inline void prefetch_to_write(const float* p) { asm volatile("prefetchw (%0)" ::"r"(p)); }

// A step that is being split, some rows at a time, in order. The place of the step after it is brought to L1 meanwhile: the stores
// would wait there for lines that the right factor has driven out.
template <typename Element, int kGroupTiles>
struct Splitting {
  const Element* row;
  int64_t stride;
  float *tiles, *tiles_after;

  template <int kFirst, int kEnd>
  [[gnu::always_inline]] void split() {
#pragma GCC unroll 64
    for (int r = kFirst; r < kEnd; ++r) {
      split_row(row, tiles + r * kTile, kGroupTiles * kTileWords);
#pragma GCC unroll 3
      for (int i = 0; i < kPartsOf<Element>; ++i) prefetch_to_write(tiles_after + r * kTile + i * kGroupTiles * kTileWords);
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
template <typename Left, int kGroupTiles>
class LeftTiles {
 public:
  using Element = typename Left::Element;
  static constexpr int64_t kRows = kGroupTiles * kTile;
  static int64_t floats(int64_t ring_steps) { return kPaddedFloats + ring_steps * kStepFloats; }

  // memory: floats(ring_steps), aligned to 64 bytes.
  LeftTiles(const Left& left, int64_t steps, int64_t ring_steps, float* memory)
      : left_(left), steps_(steps), padded_(memory), ring_(memory + kPaddedFloats), end_(ring_ + ring_steps * kStepFloats),
        first_(ring_) {}

  // Goes on to the group that begins at `row`; the one after it will probably begin at `next_row`.
  void enter(int64_t row, int64_t next_row) {
    row_ = row;
    if (next_row_ != row) {
      left_.fetch(row, kRows);
      splitting(0, first_).template split<0, kRows>();
    }
    next_row_ = next_row;
  }
  // Goes on behind the group's last step.
  void leave(float* after_last) { first_ = after_last; }

  float* first() const { return first_; }  // the group's first step
  float* next(float* step) const { return step + kStepFloats == end_ ? ring_ : step + kStepFloats; }

  // Of a step of this group; as one past its last, of the next group's first.
  Splitting<Element, kGroupTiles> splitting(int64_t step, float* tiles) const {
    const StepRows<Element> rows =
        step < steps_ ? left_.step(row_, step * kStep, kRows, padded()) : left_.step(next_row_, 0, kRows, padded());
    return {rows.base, rows.stride, tiles, next(tiles)};
  }

 private:
  static constexpr int64_t kStepFloats = kLeftStepFloats<Element, kGroupTiles>, kPaddedFloats = kRows * kStep;
  Element* padded() const { return reinterpret_cast<Element*>(padded_); }

  const Left& left_;
  int64_t steps_, row_ = 0, next_row_ = -1;
  float *padded_, *ring_, *end_, *first_;
};

// The registers of a group of two tiles and a pair of column tiles, or one of them.
template <int kGroupTiles, int kRight>
struct Multiplication {
  static_assert(kGroupTiles == 2);
  const float *left, *right0, *right1;

  // Product kNow, after kBefore; beside.at<place>() in four places.
  template <int kNow, int kBefore, typename Beside>
  [[gnu::always_inline]] void run(const Beside& beside) const {
    constexpr Product now = kProducts[kNow], before = kBefore < 0 ? Product{-1, -1} : kProducts[kBefore];
    if constexpr (now.left != before.left) {
      load_tile<4>(left + 2 * now.left * kTileWords);
      load_tile<5>(left + (2 * now.left + 1) * kTileWords);
    }
    if constexpr (now.right != before.right) {
      load_tile<6>(right0 + now.right * kTileWords);
      if constexpr (kRight == 2) load_tile<7>(right1 + now.right * kTileWords);
    }
    multiply_tiles<0, 4, 6>();
    beside.template operator()<0>();
    if constexpr (kRight == 2) multiply_tiles<1, 4, 7>();
    beside.template operator()<1>();
    multiply_tiles<2, 5, 6>();
    beside.template operator()<2>();
    if constexpr (kRight == 2) multiply_tiles<3, 5, 7>();
    beside.template operator()<3>();
  }
};

// Of a group of four and one column tile.
template <>
struct Multiplication<4, 1> {
  const float *left, *right0, *right1;

  template <int kNow, int kBefore, typename Beside>
  [[gnu::always_inline]] void run(const Beside& beside) const {
    constexpr Product now = kProducts[kNow], before = kBefore < 0 ? Product{-1, -1} : kProducts[kBefore];
    if constexpr (now.right != before.right) load_tile<6>(right0 + now.right * kTileWords);
    const float* const part = left + 4 * now.left * kTileWords;
    load_tile<4>(part);
    multiply_tiles<0, 4, 6>();
    beside.template operator()<0>();
    load_tile<5>(part + kTileWords);
    multiply_tiles<1, 5, 6>();
    beside.template operator()<1>();
    load_tile<7>(part + 2 * kTileWords);
    multiply_tiles<2, 7, 6>();
    beside.template operator()<2>();
    load_tile<4>(part + 3 * kTileWords);
    multiply_tiles<3, 4, 6>();
    beside.template operator()<3>();
  }
};

// One step of a group with kRight column tiles of the right factor, whose parts lie at right0 and right1. Beside every product of
// parts, kLines lines of 64 bytes from `lines` on are fetched.
template <int kLeftParts, int kGroupTiles, int kRight, int kLines, typename Splitting>
[[gnu::always_inline]] inline void multiply_step(const float* left, const float* right0, const float* right1, Splitting splitting,
                                                 const char* lines) {
  keep_in_register(lines);
  constexpr int kFirst = kLeftParts == kParts ? 0 : 3, kPlaces = 4 * (6 - kFirst), kRows = kGroupTiles * kTile;
  const Multiplication<kGroupTiles, kRight> multiplication{left, right0, right1};
  const auto product = [&]<int kProduct>() __attribute__((always_inline)) {
    if constexpr (kProduct >= kFirst) {
      const auto beside = [&]<int kQuarter>() __attribute__((always_inline)) {
        constexpr int kPlace = 4 * (kProduct - kFirst) + kQuarter;
        constexpr int kFirstRow = kRows * kPlace / kPlaces, kEndRow = kRows * (kPlace + 1) / kPlaces;
        constexpr int kFirstLine = kLines * kPlace / 4, kEndLine = kLines * (kPlace + 1) / 4, kCount = kEndRow - kFirstRow;
        const auto row = [&]<int kRow>() __attribute__((always_inline)) {
          if constexpr (kRow < kCount) {
            splitting.template split<kFirstRow + kRow, kFirstRow + kRow + 1>();
            constexpr int kFrom = kFirstLine + (kEndLine - kFirstLine) * kRow / kCount;
            constexpr int kTo = kFirstLine + (kEndLine - kFirstLine) * (kRow + 1) / kCount;
#pragma GCC unroll 8
            for (int i = kFrom; i < kTo; ++i) __builtin_prefetch(lines + 64 * i, 0, 2);
          }
        };
        row.template operator()<0>();
        row.template operator()<1>();
        row.template operator()<2>();
        row.template operator()<3>();
        row.template operator()<4>();
        row.template operator()<5>();
      };
      multiplication.template run<kProduct, kProduct == kFirst ? -1 : kProduct - 1>(beside);
    }
  };
  product.template operator()<0>();
  product.template operator()<1>();
  product.template operator()<2>();
  product.template operator()<3>();
  product.template operator()<4>();
  product.template operator()<5>();
}

// Bytes to be fetched for every step: the first step's, and how far on the next step's lie.
struct Lines {
  const char* at;
  int64_t per_step;
};

// The sums of a block: [kGroupTiles kTile, kRight kTile], from zero or, to resume, from what is there.
struct BlockSums {
  float* base;
  int64_t stride;
  bool resume;

  // body(register, tile)
  template <int kGroupTiles, int kRight, typename Body>
  [[gnu::always_inline]] void for_each_tile(const Body& body) const {
    constexpr bool kFour = kGroupTiles == 4;
    body.template operator()<0>(base);
    if constexpr (kFour || kRight == 2) body.template operator()<1>(kFour ? base + kTile * stride : base + kTile);
    body.template operator()<2>(base + (kFour ? 2 : 1) * kTile * stride);
    if constexpr (kFour || kRight == 2) body.template operator()<3>(kFour ? base + 3 * kTile * stride : base + kTile * stride + kTile);
  }
};

// Steps [first, end) with kRight tiles of columns; the first lies at `now`. While they pass, those up to split_end are split, each
// one step ahead. Returns where step `end` lies.
template <int kRight, int kLines, typename Left, int kGroupTiles>
[[gnu::noinline]] float* multiply_block(const LeftTiles<Left, kGroupTiles>& left, float* now, int64_t first, int64_t end,
                                        int64_t split_end, const float* right0, const float* right1, Lines lines,
                                        const BlockSums& sums) {
  constexpr int kLeftParts = kPartsOf<typename Left::Element>;
  sums.for_each_tile<kGroupTiles, kRight>([&]<int kRegister>(const float* tile) {
    if (sums.resume) {
      load_tile<kRegister>(tile, 4 * sums.stride);
    } else {
      zero_tile<kRegister>();
    }
  });
  for (int64_t step = first + 1; step <= end; ++step) {
    float* const next = left.next(now);
    if (step < split_end) {
      multiply_step<kLeftParts, kGroupTiles, kRight, kLines>(now, right0, right1, left.splitting(step, next), lines.at);
    } else {
      multiply_step<kLeftParts, kGroupTiles, kRight, kLines>(now, right0, right1, NoSplitting{}, lines.at);
    }
    now = next;
    right0 += kPanelStepWords;
    right1 += kPanelStepWords;
    lines.at += lines.per_step;
  }
  sums.for_each_tile<kGroupTiles, kRight>([&]<int kRegister>(float* tile) { store_tile<kRegister>(tile, sums.stride); });
  return now;
}

}  // namespace hybrid::HYBRID_ISA
