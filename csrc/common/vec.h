// A vector of floats as wide as the instruction set of the file that includes it: 4 (generic), 8 (AVX2) or 16 (AVX-512).
// For *.simd.cpp files only. Everything lives in the namespace HYBRID_ISA, so that the copies never mix.
//
// +, -, *, / and comparisons round each operation once, in every build: the library is compiled with -ffp-contract=off,
// and a fused multiply-add happens only where fma() is written. (The generic copy has no such instruction and rounds twice.)
#pragma once
#ifndef HYBRID_ISA
#error "vec.h is for *.simd.cpp files, which are compiled once per instruction set"
#endif

#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace hybrid::HYBRID_ISA {

#if defined(__AVX512F__)
inline constexpr int kVecWidth = 16;
#elif defined(__AVX2__)
inline constexpr int kVecWidth = 8;
#else
inline constexpr int kVecWidth = 4;
#endif

struct Vec {
  static constexpr int64_t width = kVecWidth;
  typedef float Float __attribute__((vector_size(kVecWidth * sizeof(float))));
  typedef float FloatUnaligned __attribute__((vector_size(kVecWidth * sizeof(float)), aligned(4), may_alias));
  typedef int32_t Int __attribute__((vector_size(kVecWidth * sizeof(int32_t))));
  using Mask = Int;  // all bits set where true

  Float v;

  Vec() : v{} {}
  Vec(float x) : v(x - Float{}) {}  // a scalar broadcasts; x - 0 is x for every x, -0 included
  explicit Vec(Float x) : v(x) {}

  static Vec load(const float* p) { return Vec(static_cast<Float>(*reinterpret_cast<const FloatUnaligned*>(p))); }
  void store(float* p) const { *reinterpret_cast<FloatUnaligned*>(p) = v; }
  static Vec load(const float* p, int64_t count);  // 0 <= count <= width; the other lanes are 0 and are not read
  void store(float* p, int64_t count) const;       // the other lanes are not written

  float operator[](int64_t lane) const { return v[lane]; }

  friend Vec operator+(Vec a, Vec b) { return Vec(a.v + b.v); }
  friend Vec operator-(Vec a, Vec b) { return Vec(a.v - b.v); }
  friend Vec operator*(Vec a, Vec b) { return Vec(a.v * b.v); }
  friend Vec operator/(Vec a, Vec b) { return Vec(a.v / b.v); }
  friend Vec operator-(Vec a) { return Vec(-a.v); }
  friend Vec& operator+=(Vec& a, Vec b) { return a = a + b; }
  friend Vec& operator*=(Vec& a, Vec b) { return a = a * b; }
  friend Mask operator>(Vec a, Vec b) { return a.v > b.v; }
  friend Mask operator<(Vec a, Vec b) { return a.v < b.v; }
  friend Mask operator>=(Vec a, Vec b) { return a.v >= b.v; }
  friend Mask operator<=(Vec a, Vec b) { return a.v <= b.v; }
};

inline Vec select(Vec::Mask mask, Vec a, Vec b) { return Vec(mask ? a.v : b.v); }
inline Vec::Mask is_nan(Vec a) { return a.v != a.v; }

// Both give b where either is NaN, and where both are zero: a > b ? a : b, which is one instruction on x86.
#if defined(__AVX512F__)  // with a full mask: GCC's unmasked forms warn of an uninitialised operand wherever they are inlined
inline Vec max(Vec a, Vec b) { return Vec(static_cast<Vec::Float>(_mm512_maskz_max_ps(0xffff, a.v, b.v))); }
inline Vec min(Vec a, Vec b) { return Vec(static_cast<Vec::Float>(_mm512_maskz_min_ps(0xffff, a.v, b.v))); }
#elif defined(__AVX2__)
inline Vec max(Vec a, Vec b) { return Vec(static_cast<Vec::Float>(_mm256_max_ps(a.v, b.v))); }
inline Vec min(Vec a, Vec b) { return Vec(static_cast<Vec::Float>(_mm256_min_ps(a.v, b.v))); }
#else
inline Vec max(Vec a, Vec b) { return Vec(a.v > b.v ? a.v : b.v); }
inline Vec min(Vec a, Vec b) { return Vec(a.v < b.v ? a.v : b.v); }
#endif

inline Vec::Int as_int(Vec a) { return reinterpret_cast<Vec::Int>(a.v); }
inline Vec as_float(Vec::Int a) { return Vec(reinterpret_cast<Vec::Float>(a)); }
inline Vec abs(Vec a) { return as_float(as_int(a) & 0x7fffffff); }
inline Vec copy_sign(Vec magnitude, Vec sign) {
  return as_float((as_int(magnitude) & 0x7fffffff) | (as_int(sign) & INT32_MIN));
}

// a * b + c, rounded once where the processor can.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return Vec(static_cast<Vec::Float>(_mm512_fmadd_ps(a.v, b.v, c.v)));
#elif defined(__AVX2__)
  return Vec(static_cast<Vec::Float>(_mm256_fmadd_ps(a.v, b.v, c.v)));
#else
  return a * b + c;
#endif
}

// Reductions halve the vector until one lane is left, lane i taking in lane i + half: one fixed order, in registers.
template <typename Op>
inline float reduce(Vec a, const Op& op) {
#if defined(__AVX512F__)
  const __m256 eight = op(_mm512_maskz_extractf32x8_ps(0xff, a.v, 0), _mm512_maskz_extractf32x8_ps(0xff, a.v, 1));
#elif defined(__AVX2__)
  const __m256 eight = a.v;
#endif
#if defined(__AVX2__)
  const __m128 four = op(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#else
  const Vec::Float four = a.v;
#endif
  return op(op(four[0], four[2]), op(four[1], four[3]));
}
inline float reduce_add(Vec a) {
  return reduce(a, [](auto x, auto y) { return x + y; });
}
inline float reduce_max(Vec a) {
  return reduce(a, [](auto x, auto y) { return x > y ? x : y; });
}

#if defined(__AVX512F__)
inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }
inline Vec Vec::load(const float* p, int64_t count) {
  if (count == width) return load(p);
  return Vec(static_cast<Float>(_mm512_maskz_loadu_ps(first_lanes(count), p)));
}
inline void Vec::store(float* p, int64_t count) const {
  if (count == width) return store(p);
  _mm512_mask_storeu_ps(p, first_lanes(count), v);
}
#elif defined(__AVX2__)
inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec Vec::load(const float* p, int64_t count) {
  if (count == width) return load(p);
  return Vec(static_cast<Float>(_mm256_maskload_ps(p, first_lanes(count))));
}
inline void Vec::store(float* p, int64_t count) const {
  if (count == width) return store(p);
  _mm256_maskstore_ps(p, first_lanes(count), v);
}
#else
inline Vec Vec::load(const float* p, int64_t count) {
  if (count == width) return load(p);
  Vec out;
  for (int64_t i = 0; i < count; ++i) out.v[i] = p[i];
  return out;
}
inline void Vec::store(float* p, int64_t count) const {
  if (count == width) return store(p);
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}
#endif

// Calls fn(offset, lanes) over [0, n): whole vectors, then one partial vector. Use `load(p + i, lanes)` and
// `store(p + i, lanes)` inside; lanes is the constant Vec::width in the first loop, which the compiler then does without masks.
template <typename Fn>
inline void for_each_vec(int64_t n, const Fn& fn) {
  int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) fn(i, Vec::width);
  if (i < n) fn(i, n - i);
}

}  // namespace hybrid::HYBRID_ISA
