// exp, tanh, erf and sigmoid on Vec. For *.simd.cpp files only.
//
// Errors are at most about 2 units in the last place (csrc/tests/vec_test.simd.cpp measures them). Every instruction set runs the
// same polynomials; their coefficients are minimax fits (Lawson's iteration, weighted for the error of the function itself),
// rounded to float. Only the generic copy, which has no fused multiply-add, differs in the last bits.
#pragma once
#include "common/vec.h"

namespace hybrid::HYBRID_ISA {

// c[0] + c[1] x + c[2] x^2 + ..., by Horner's rule.
template <int kTerms>
inline Vec polynomial(Vec x, const float (&c)[kTerms]) {
  Vec sum = c[kTerms - 1];
  for (int i = kTerms - 2; i >= 0; --i) sum = fma(sum, x, c[i]);
  return sum;
}

// 2^n for integral n in [-126, 127].
inline Vec power_of_two(Vec::Int n) { return as_float((n + 127) << 23); }

// e^x: 0 below -104, infinity above 88.73, NaN for NaN; denormal results are exact to their last place.
inline Vec exp(Vec x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the first has 10 bits: n times it is exact
  static constexpr float kTail[] = {4.999999404e-01f, 1.666651964e-01f, 4.166839272e-02f, 8.368780836e-03f,
                                    1.381446491e-03f};  // (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2
  x = max(Vec(-104.0f), min(Vec(89.0f), x));  // in this order a NaN stays
  const Vec shifted = fma(x, 1.44269504f, kMagic);
  const Vec n = shifted - kMagic;
  const Vec r = fma(n, -kLn2Low, fma(n, -kLn2High, x));
  const Vec e = fma(r * r, polynomial(r, kTail), r) + 1.0f;
#if defined(__AVX512F__)  // rounds once, as the two steps below do, whose first is exact
  return Vec(static_cast<Vec::Float>(_mm512_maskz_scalef_ps(0xffff, e.v, n.v)));
#else
  const Vec::Int whole = as_int(shifted) - as_int(Vec(kMagic));
  const Vec::Int half = whole >> 1;  // two steps reach denormals and infinity
  return e * power_of_two(half) * power_of_two(whole - half);
#endif
}

// 1 / (1 + e^-x).
inline Vec sigmoid(Vec x) { return Vec(1.0f) / (exp(-x) + 1.0f); }

// Near 0 a polynomial, which keeps small arguments exact; elsewhere through exp.
inline Vec tanh(Vec x) {
  static constexpr float kNear[] = {-3.333333135e-01f, 1.333321035e-01f,  -5.394720286e-02f,
                                    2.170296758e-02f,  -8.182673715e-03f, 2.147536958e-03f};  // (tanh(x)/x - 1) / x^2
  const Vec magnitude = abs(x);
  const Vec square = x * x;
  const Vec near = fma(magnitude * square, polynomial(square, kNear), magnitude);
  const Vec far = Vec(1.0f) - Vec(2.0f) / (exp(magnitude + magnitude) + 1.0f);
  return copy_sign(select(magnitude < 0.625f, near, far), x);
}

// Near 0 a polynomial; elsewhere 1 - e^(-x Q(x)), whose error is that of the small second term.
inline Vec erf(Vec x) {
  static constexpr float kNear[] = {1.283791661e-01f,  -3.761262596e-01f, 1.128360033e-01f, -2.685444430e-02f,
                                    5.189535208e-03f, -8.020841051e-04f, 7.889119297e-05f};  // erf(x)/x - 1 in x^2, |x| <= 1
  static constexpr float kFar[] = {1.128453732e+00f, 6.361561418e-01f,  1.040295660e-01f,
                                   -2.107164823e-02f, 1.656847075e-03f,  5.834997282e-04f,
                                   -2.378312201e-04f, 3.752661723e-05f, -2.360249027e-06f};  // -log(erfc(x))/x, .9..4.2
  const Vec magnitude = min(Vec(4.2f), abs(x));  // erf is 1 in float from 3.92 on; a NaN stays
  const Vec square = magnitude * magnitude;
  const Vec near = fma(magnitude, polynomial(square, kNear), magnitude);
  const Vec far = Vec(1.0f) - exp(-(magnitude * polynomial(magnitude, kFar)));
  return copy_sign(select(magnitude < 0.95f, near, far), x);
}

}  // namespace hybrid::HYBRID_ISA
