// Products of floats on a matrix unit that multiplies bfloat16 and adds up in float32 (Intel's AMX). For *.amx.cpp files only.
//
// A float is the exact sum of three bfloat16: the leading, the middle and the trailing eight bits of its significand. Of the nine
// products of two such sums the six that reach a float's precision are computed, smallest first:
//   a b ~ a2 b0 + a1 b0 + a1 b1 + a0 b1 + a0 b2 + a0 b0      (the others are below 2^-22 of a b)
// (Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", 2019.)
// One instruction multiplies [16, 32] by [32, 16]. It adds up an output's first 16 products and its last 16 in two chains of
// float32, then their sum and the accumulator: fewer large terms meet than in a chain of multiply-adds.
//
// The unit takes subnormal numbers for zero. An infinite factor, or one that rounds to infinity, gives NaN.
#pragma once
#include "common/bfloat16.h"
#include "common/vec.h"

namespace hybrid::HYBRID_ISA {

inline constexpr int64_t kTile = 16;                      // rows of a tile register, each of 64 bytes
inline constexpr int64_t kStep = 32;                      // depth of a tile
inline constexpr int64_t kTileWords = kTile * kStep / 2;  // of 32 bits: the bfloat16 of depth d below, of d + 16 above
inline constexpr int kParts = 3;                          // bfloat16 of a float, the leading one first

// The tile registers, this thread's while one lives: 0 to 3 hold sums, 4 and 5 tiles of the left factor, 6 and 7 of the right.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
    } const shape;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~TileRegisters() { asm volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

template <int kRegister>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kRegister));
}
template <int kRegister>
inline void load_tile(const void* rows, int64_t stride_bytes = 64) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride_bytes), "i"(kRegister) : "memory");
}
template <int kRegister>
inline void store_tile(float* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(4 * stride), "i"(kRegister) : "memory");
}
template <int kSum, int kLeft, int kRight>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight) : "memory");
}

// Words of two bfloat16. Their memory is that of as many floats, which nothing computes with.
using Words = uint32_t __attribute__((vector_size(64)));
inline Words as_words(Vec a) { return reinterpret_cast<Words>(a.v); }
inline void store_words(Words words, float* to) { Vec(reinterpret_cast<Vec::Float>(words)).store(to); }

inline Vec leading(Vec a) { return Vec(reinterpret_cast<Vec::Float>(as_words(a) & 0xffff0000u)); }

// The leading bfloat16 of 32 floats.
inline Words pack_words(Vec first, Vec second) { return (as_words(first) >> 16) | (as_words(second) & 0xffff0000u); }

// A row of the left factor, 32 deep, to its parts, `part_floats` apart. Cut off, not rounded: what is left is the next part.
[[gnu::always_inline]] inline void split_row(const float* row, float* to, int64_t part_floats) {
  Vec first = Vec::load(row), second = Vec::load(row + 16);
  store_words(pack_words(first, second), to);
  first = first - leading(first);
  second = second - leading(second);
  store_words(pack_words(first, second), to + part_floats);
  store_words(pack_words(first - leading(first), second - leading(second)), to + 2 * part_floats);
}
// A bfloat16 is its own leading part, and the others are zero.
[[gnu::always_inline]] inline void split_row(const BFloat16* row, float* to, int64_t) {
  const __m512i pairs = _mm512_setr_epi32(0x00100000, 0x00110001, 0x00120002, 0x00130003, 0x00140004, 0x00150005, 0x00160006,
                                          0x00170007, 0x00180008, 0x00190009, 0x001a000a, 0x001b000b, 0x001c000c, 0x001d000d,
                                          0x001e000e, 0x001f000f);
  store_words(reinterpret_cast<Words>(_mm512_maskz_permutexvar_epi16(0xffffffff, pairs, _mm512_loadu_si512(row))), to);
}
template <typename Element>
inline constexpr int kPartsOf = sizeof(Element) == sizeof(float) ? kParts : 1;

// The nearest bfloat16, ties away from zero. Parts of the right factor are rounded, so that what the six products leave out has any
// sign.
inline Vec rounded(Vec a) { return Vec(reinterpret_cast<Vec::Float>((as_words(a) + 0x8000u) & 0xffff0000u)); }

// Products of parts, the smallest first; a bfloat16 left factor has the last three.
struct Product {
  int left, right;
};
inline constexpr Product kProducts[] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}};

}  // namespace hybrid::HYBRID_ISA
