// activation.cuh against its formulas: every kind and dtype, odd widths, arrays off the 16-byte boundary, more than one block of
// rows.
#include "activation/activation.cuh"

#include <functional>

#include "tests/simt/harness.h"

namespace hybrid::testing {
namespace {

constexpr Activation kKinds[] = {Activation::kRelu, Activation::kSilu, Activation::kGeluTanh, Activation::kGeluErf};
constexpr const char* kKindNames[] = {"relu", "silu", "gelu_tanh", "gelu_erf"};

template <typename Real>
Real activate(Activation kind, Real x) {
  switch (kind) {
    case Activation::kRelu: return x > 0 ? x : Real(0);
    case Activation::kSilu: return x / (Real(1) + std::exp(-x));
    case Activation::kGeluTanh:
      return Real(0.5) * x * (Real(1) + std::tanh(Real(0.7978845608028654) * (x + Real(0.044715) * x * x * x)));
    case Activation::kGeluErf: return Real(0.5) * x * (Real(1) + std::erf(x * Real(0.7071067811865476)));
  }
  return 0;
}

template <typename Real>
Real slope(Activation kind, Real x) {
  switch (kind) {
    case Activation::kRelu: return x > 0 ? Real(1) : Real(0);
    case Activation::kSilu: {
      const Real s = Real(1) / (Real(1) + std::exp(-x));
      return s * (Real(1) + x * (Real(1) - s));
    }
    case Activation::kGeluTanh: {
      const Real k = Real(0.7978845608028654), t = std::tanh(k * (x + Real(0.044715) * x * x * x));
      return Real(0.5) * (Real(1) + t) + Real(0.5) * x * (Real(1) - t * t) * k * (Real(1) + Real(0.134145) * x * x);
    }
    case Activation::kGeluErf:
      return Real(0.5) * (Real(1) + std::erf(x * Real(0.7071067811865476))) +
             x * Real(0.3989422804014327) * std::exp(Real(-0.5) * x * x);
  }
  return 0;
}

// Numbers over all the regions of an activation.
template <typename T>
void fill_wide(Buffer<T>& out, uint64_t seed) {
  Random random(seed);
  random.fill(out, 3.0);
  const float special[] = {0.0f, -0.0f, 12.0f, -12.0f, 0.7f, -0.7f, 1e-6f};
  for (int64_t i = 0; i < out.size(); i += 13) out[i] = round_to<T>(special[i / 13 % 7]);
}

// The whole expression in float, each torch operator rounded: x + bias, act, times the other factor.
template <typename Mode, typename T>
std::vector<double> each(int64_t rows, int64_t cols, const std::function<typename Mode::Real(int64_t, int64_t)>& fn) {
  std::vector<double> out;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) out.push_back(fn(row, col));
  }
  return out;
}

template <typename T>
struct Case {
  GridCase grid;
  Activation kind;
  Buffer<T> x, bias, gate_up, grad_y;
  std::string what;

  Case(const GridCase& g, int k)
      : grid(g), kind(kKinds[k]), x(g.rows * g.cols, g.shift), bias(g.cols, g.shift),
        gate_up(2 * g.rows * g.cols, g.shift), grad_y(g.rows * g.cols, g.shift),
        what(std::string(kKindNames[k]) + " " + kTypeName<T> + " " + g.name()) {
    fill_wide(x, 1 + g.cols);
    fill_wide(gate_up, 2 + g.cols);
    Random random(3 + g.cols);
    random.fill(bias);
    random.fill(grad_y);
  }

  template <typename Mode>
  typename Mode::Real shifted(int64_t row, int64_t col, bool with_bias) const {
    using Real = typename Mode::Real;
    const Real value = to_float(x[row * grid.cols + col]);
    return with_bias ? Mode::round(value + Real(to_float(bias[col]))) : value;
  }
  template <typename Real>
  Real grad(int64_t row, int64_t col) const {
    return to_float(grad_y[row * grid.cols + col]);
  }
  template <typename Real>
  Real gate(int64_t row, int64_t col) const {
    return to_float(gate_up[row * 2 * grid.cols + col]);
  }
  template <typename Real>
  Real up(int64_t row, int64_t col) const {
    return to_float(gate_up[row * 2 * grid.cols + grid.cols + col]);
  }
};

template <typename T, typename Run, typename Expected>
void compare(Accuracy& accuracy, const Case<T>& c, const std::string& what, int64_t size, const Run& run,
             const Expected& expected) {
  const auto results = in_every_order(what, [&] {
    std::vector<Buffer<T>> out;
    out.emplace_back(size, c.grid.shift);
    run(out[0]);
    return out;
  });
  accuracy.check(results[0], expected(Exact{}), expected(Plain<T>{}), what);
}

template <typename T>
void test_bias(const Case<T>& c, bool with_bias, Accuracy& forward, Accuracy& backward) {
  const auto [rows, cols, shift] = c.grid;
  const T* bias = with_bias ? c.bias.data() : nullptr;
  const std::string what = c.what + (with_bias ? " bias" : "");
  compare<T>(
      forward, c, what, rows * cols,
      [&](Buffer<T>& y) {
        cuda::bias_activation<T>({c.x.data(), bias, y.data(), rows, cols}, c.kind, nullptr);
      },
      [&](auto mode) {
        using Mode = decltype(mode);
        return each<Mode, T>(rows, cols, [&](int64_t i, int64_t j) {
          return Mode::round(activate(c.kind, c.template shifted<Mode>(i, j, with_bias)));
        });
      });

  const auto results = in_every_order(what + " backward", [&] {
    std::vector<Buffer<T>> out;
    out.emplace_back(rows * cols, shift);
    out.emplace_back(with_bias ? cols : 0, shift);
    Buffer<float> partial(with_bias ? column_sum_blocks(rows) * cols : 0);
    cuda::bias_activation_backward<T>({c.grad_y.data(), c.x.data(), bias, out[0].data(),
                                       with_bias ? out[1].data() : nullptr, with_bias ? partial.data() : nullptr, rows,
                                       cols},
                                      c.kind, nullptr);
    return out;
  });
  const auto grad_x = [&](auto mode) {
    using Mode = decltype(mode);
    using Real = typename Mode::Real;
    return each<Mode, T>(rows, cols, [&](int64_t i, int64_t j) {
      return Mode::round(c.template grad<Real>(i, j) * slope(c.kind, c.template shifted<Mode>(i, j, with_bias)));
    });
  };
  const std::vector<double> exact = grad_x(Exact{}), plain = grad_x(Plain<T>{});
  backward.check(results[0], exact, plain, what + " grad_x");
  if (!with_bias) return;
  const auto column_sums = [&](const std::vector<double>& of, auto mode) {
    using Mode = decltype(mode);
    std::vector<double> sums;
    for (int64_t j = 0; j < cols; ++j) {
      typename Mode::Real sum = 0;
      for (int64_t i = 0; i < rows; ++i) sum += static_cast<typename Mode::Real>(of[i * cols + j]);
      sums.push_back(Mode::round(sum));
    }
    return sums;
  };
  backward.check(results[1], column_sums(exact, Exact{}), column_sums(plain, Plain<T>{}), what + " grad_bias");
}

template <typename T>
void test_gated(const Case<T>& c, Accuracy& forward, Accuracy& backward) {
  const auto [rows, cols, shift] = c.grid;
  (void)shift;
  compare<T>(
      forward, c, c.what + " gated", rows * cols,
      [&](Buffer<T>& y) { cuda::gated_activation<T>({c.gate_up.data(), y.data(), rows, cols}, c.kind, nullptr); },
      [&](auto mode) {
        using Mode = decltype(mode);
        using Real = typename Mode::Real;
        return each<Mode, T>(rows, cols, [&](int64_t i, int64_t j) {
          return Mode::round(Mode::round(activate(c.kind, c.template gate<Real>(i, j))) * c.template up<Real>(i, j));
        });
      });
  compare<T>(
      backward, c, c.what + " gated backward", 2 * rows * cols,
      [&](Buffer<T>& grad) {
        cuda::gated_activation_backward<T>({c.grad_y.data(), c.gate_up.data(), grad.data(), rows, cols}, c.kind,
                                           nullptr);
      },
      [&](auto mode) {
        using Mode = decltype(mode);
        using Real = typename Mode::Real;
        return each<Mode, T>(rows, 2 * cols, [&](int64_t i, int64_t j) {
          if (j < cols) {
            return Mode::round(Mode::round(c.template grad<Real>(i, j) * c.template up<Real>(i, j)) *
                               slope(c.kind, c.template gate<Real>(i, j)));
          }
          return Mode::round(c.template grad<Real>(i, j - cols) *
                             Mode::round(activate(c.kind, c.template gate<Real>(i, j - cols))));
        });
      });
}

// Where x^2 or e^x overflows an activation is x or 0 and its slope 1 or 0; a NaN stays one.
template <typename T>
void test_extremes(int kind) {
  const float inputs[8] = {60000.0f, -60000.0f, 1000.0f, -1000.0f, 90.0f, -110.0f, NAN, 0.0f};
  Buffer<T> x(8), y(8), ones(8), slopes(8);
  for (int i = 0; i < 8; ++i) {
    x[i] = round_to<T>(inputs[i]);
    ones[i] = round_to<T>(1.0f);
  }
  cuda::bias_activation<T>({x.data(), nullptr, y.data(), 1, 8}, kKinds[kind], nullptr);
  cuda::bias_activation_backward<T>({ones.data(), x.data(), nullptr, slopes.data(), nullptr, nullptr, 1, 8},
                                    kKinds[kind], nullptr);
  for (int i = 0; i < 6; ++i) {
    expect(to_float(y[i]) == (i % 2 == 0 ? to_float(x[i]) : 0.0f), "value far from 0");
    expect(to_float(slopes[i]) == (i % 2 == 0 ? 1.0f : 0.0f), "slope far from 0");
  }
  expect(std::isnan(to_float(y[6])), "NaN");
  expect(to_float(y[7]) == 0.0f, "zero");
}

template <typename T>
void test_type() {
  std::vector<GridCase> grid = {{1, 1}, {3, 123}, {5, 64}, {66, 8, 1}, {2, 1032}, {1, 1031}, {0, 8}, {2, 0}};
  if (full_grid()) {
    const std::vector<GridCase> more = {{65, 40}, {130, 3}, {7, 576}, {1, 5000}, {4, 1024, 2}, {9, 65}};
    grid.insert(grid.end(), more.begin(), more.end());
  }
  for (int kind = 0; kind < 4; ++kind) {
    test_extremes<T>(kind);
    const std::string suffix = std::string(" ") + kKindNames[kind] + " " + kTypeName<T>;
    Accuracy bias("bias_activation" + suffix), bias_backward("bias_activation_backward" + suffix);
    Accuracy gated("gated_activation" + suffix), gated_backward("gated_activation_backward" + suffix);
    for (const GridCase& g : grid) {
      const Case<T> c(g, kind);
      for (const bool with_bias : {false, true}) test_bias(c, with_bias, bias, bias_backward);
      test_gated(c, gated, gated_backward);
    }
  }
}

}  // namespace
}  // namespace hybrid::testing

int main() {
  hybrid::testing::for_each_type([](auto kind) { hybrid::testing::test_type<decltype(kind)>(); });
  return hybrid::testing::finish_simt("activation");
}
