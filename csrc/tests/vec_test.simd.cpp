// Vectors and the functions on them: lane counts touch nothing beyond, reductions are exact on integers, and exp, tanh, erf and
// sigmoid stay within their stated errors over their whole ranges.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/isa.h"
#include "common/math.h"
#include "tests/check.h"

namespace hybrid::HYBRID_ISA {
namespace {

using hybrid::testing::expect;

void test_partial_load_and_store() {
  float from[kVecWidth], to[kVecWidth];
  for (int i = 0; i < kVecWidth; ++i) from[i] = static_cast<float>(i + 1);
  for (int64_t count = 0; count <= Vec::width; ++count) {
    std::fill(to, to + kVecWidth, -1.0f);
    const Vec loaded = Vec::load(from, count);
    loaded.store(to, count);
    for (int i = 0; i < kVecWidth; ++i) {
      expect(loaded[i] == (i < count ? from[i] : 0.0f), "partial load");
      expect(to[i] == (i < count ? from[i] : -1.0f), "partial store");
    }
  }
}

void test_reductions() {
  float lanes[kVecWidth];
  for (int i = 0; i < kVecWidth; ++i) lanes[i] = static_cast<float>(i == 2 ? 100 : i);
  const float sum = kVecWidth * (kVecWidth - 1) / 2.0f + 98.0f;
  expect(reduce_add(Vec::load(lanes)) == sum, "reduce_add");
  expect(reduce_max(Vec::load(lanes)) == 100.0f, "reduce_max");
  // The order: halves of a vector are added before their own lanes, so a large pair that cancels takes nothing with it.
  std::fill(lanes, lanes + kVecWidth, 1.0f);
  lanes[0] = 1e9f;
  lanes[kVecWidth / 2] = -1e9f;
  expect(reduce_add(Vec::load(lanes)) == kVecWidth - 2.0f, "reduce_add halves");
}

void test_extremes() {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  expect(max(Vec(nan), Vec(1.0f))[0] == 1.0f && min(Vec(nan), Vec(1.0f))[0] == 1.0f, "the second where the first is NaN");
  expect(std::isnan(max(Vec(1.0f), Vec(nan))[0]) && std::isnan(min(Vec(1.0f), Vec(nan))[0]), "the second where it is NaN");
  expect(max(Vec(2.0f), Vec(1.0f))[0] == 2.0f && min(Vec(2.0f), Vec(1.0f))[0] == 1.0f, "max and min");
}

void test_special_values() {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  expect(std::isnan(exp(Vec(nan))[0]) && std::isnan(tanh(Vec(nan))[0]) && std::isnan(erf(Vec(nan))[0]), "NaN passes");
  expect(exp(Vec(-inf))[0] == 0.0f && exp(Vec(inf))[0] == inf && exp(Vec(0.0f))[0] == 1.0f, "exp at the ends");
  expect(tanh(Vec(inf))[0] == 1.0f && tanh(Vec(-inf))[0] == -1.0f, "tanh at the ends");
  expect(erf(Vec(inf))[0] == 1.0f && erf(Vec(-inf))[0] == -1.0f, "erf at the ends");
  expect(std::signbit(tanh(Vec(-0.0f))[0]) && std::signbit(erf(Vec(-0.0f))[0]), "odd functions keep the sign of zero");
  expect(sigmoid(Vec(-inf))[0] == 0.0f && sigmoid(Vec(inf))[0] == 1.0f, "sigmoid at the ends");
}

// Largest error in units in the last place of the exact value.
template <typename Fn, typename Exact>
void test_error(const char* name, double allowed, float low, float high, const Fn& fn, const Exact& exact) {
  constexpr int kSamples = 1 << 18;
  double worst = 0;
  for (int i = 0; i < kSamples; i += kVecWidth) {
    float x[kVecWidth], y[kVecWidth];
    for (int k = 0; k < kVecWidth; ++k) x[k] = low + (high - low) * (static_cast<float>(i + k) / kSamples);
    fn(Vec::load(x)).store(y);
    for (int k = 0; k < kVecWidth; ++k) {
      const double want = exact(static_cast<double>(x[k]));
      const int exponent = want == 0 ? -149 : std::max(-149, std::ilogb(want) - 23);
      worst = std::max(worst, std::fabs(y[k] - want) / std::ldexp(1.0, exponent));
    }
  }
  if (worst > allowed) std::fprintf(stderr, "%s on [%g, %g]: %.2f ulp, %.2f allowed\n", name, low, high, worst, allowed);
  expect(worst <= allowed, name);
}

void test_errors() {
  const auto exponential = [](double x) { return std::exp(x); };
  test_error("exp", 1.1, -87.0f, 88.7f, [](Vec x) { return exp(x); }, exponential);
  test_error("exp (denormal)", 1.0, -103.9f, -87.0f, [](Vec x) { return exp(x); }, exponential);
  const auto hyperbolic = [](double x) { return std::tanh(x); };
  test_error("tanh", 1.5, -10.0f, 10.0f, [](Vec x) { return tanh(x); }, hyperbolic);
  test_error("tanh (small)", 1.5, -0.7f, 0.7f, [](Vec x) { return tanh(x); }, hyperbolic);
  const auto error_function = [](double x) { return std::erf(x); };
  test_error("erf", 1.5, -5.0f, 5.0f, [](Vec x) { return erf(x); }, error_function);
  test_error("erf (small)", 1.5, -1.0f, 1.0f, [](Vec x) { return erf(x); }, error_function);
  const auto logistic = [](double x) { return 1.0 / (1.0 + std::exp(-x)); };
  test_error("sigmoid", 2.5, -80.0f, 80.0f, [](Vec x) { return sigmoid(x); }, logistic);
}

}  // namespace

int run() {
  test_partial_load_and_store();
  test_reductions();
  test_extremes();
  test_special_values();
  test_errors();
  return hybrid::testing::finish();
}

}  // namespace hybrid::HYBRID_ISA

int main() {
  const bool supported = std::strcmp(HYBRID_ISA_NAME, "generic") == 0 ||
                         (std::strcmp(HYBRID_ISA_NAME, "avx2") == 0 && hybrid::current_isa() >= hybrid::Isa::kAvx2) ||
                         hybrid::current_isa() == hybrid::Isa::kAvx512;
  return supported ? hybrid::HYBRID_ISA::run() : 77;
}
