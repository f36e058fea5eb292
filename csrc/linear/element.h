// Elements of a stored matrix as floats. A bfloat16 is the upper half of the float of its value, so two of them lie in the
// four bytes of a float, and a lane is either a float or such a pair: whatever moves floats, without computing, moves pairs.
#pragma once
#include <bit>
#include <cstring>

#include "common/bfloat16.h"
#include "common/vec.h"
#include "linear/linear.h"

namespace hybrid::HYBRID_ISA {

template <typename Element>
inline constexpr int kPerLane = sizeof(float) / sizeof(Element);

// Calls body with the weight as elements of its own type.
template <typename Body>
inline void with_elements(const Weight& weight, const Body& body) {
  if (weight.type == Weight::Type::kFloat32) {
    body(static_cast<const float*>(weight.data));
  } else {
    body(static_cast<const BFloat16*>(weight.data));
  }
}

inline float to_float(float element) { return element; }
inline float to_float(BFloat16 element) { return std::bit_cast<float>(uint32_t{element.bits} << 16); }

// Element `place` of every lane, widened.
template <typename Element>
inline Vec widened(Vec lanes, int place) {
  if constexpr (kPerLane<Element> == 1) return lanes;
  return as_float(place == 0 ? as_int(lanes) << 16 : as_int(lanes) & static_cast<int32_t>(0xffff0000));
}

// The lane at p, which need not be aligned.
template <typename Element>
inline int32_t load_lane(const Element* p) {
  int32_t lane;
  std::memcpy(&lane, p, sizeof(lane));
  return lane;
}

// To be moved only.
template <typename Element>
inline const float* as_floats(const Element* p) {
  return reinterpret_cast<const float*>(p);
}

// Vec::width elements, widened.
inline Vec load_floats(const BFloat16* p) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return as_float(reinterpret_cast<Vec::Int>(wide) << 16);
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return as_float(reinterpret_cast<Vec::Int>(wide) << 16);
#else
  Vec::Int wide{};
  for (int64_t i = 0; i < Vec::width; ++i) wide[i] = p[i].bits << 16;
  return as_float(wide);
#endif
}

}  // namespace hybrid::HYBRID_ISA
