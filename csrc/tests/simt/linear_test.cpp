// The linear layer of a few rows against fp64: 1 to 16 rows, widths around 16 outputs, 32 columns and what 8 warps share, with and
// without a bias and a low-rank term in splits; and a row's bits do not depend on the others.
#include "activation/activation.cuh"
#include "linear/skinny_linear.cuh"
#include "tests/simt/harness.h"

namespace hybrid::testing {
namespace {

struct LinearCase {
  int64_t rows, N, K;
  bool bias = false;
  int rank = 0;
  std::vector<int64_t> splits = {};
  int64_t shift = 0;
  std::string name() const {
    return "[" + std::to_string(rows) + ", " + std::to_string(K) + "] x [" + std::to_string(N) + "] rank " +
           std::to_string(rank) + " splits " + std::to_string(splits.size()) + " shift " + std::to_string(shift);
  }
};

template <typename T>
struct Layer {
  Buffer<T> x, weight, bias, a, b;
  explicit Layer(const LinearCase& c)
      : x(c.rows * c.K, c.shift), weight(c.N * c.K, c.shift), bias(c.N, c.shift),
        a(std::ssize(c.splits) * c.rank * c.K, c.shift), b(c.N * c.rank, c.shift) {
    Random random(89 + c.N);
    random.fill(x);
    random.fill(weight, 0.2);
    random.fill(bias);
    random.fill(a, 0.2);
    random.fill(b, 0.2);
  }
};

constexpr float kScale = 0.5f;

// x W^T + b + scale (x A^T) B^T as torch writes it: every product rounded, then every sum.
template <typename Mode, typename T>
std::vector<double> multiply(const Layer<T>& layer, const LinearCase& c) {
  using Real = typename Mode::Real;
  const auto dot = [&](const Buffer<T>& w, int64_t row, int64_t output) {
    Real sum = 0;
    for (int64_t k = 0; k < c.K; ++k) sum += Real(to_float(layer.x[row * c.K + k])) * Real(to_float(w[output * c.K + k]));
    return sum;
  };
  std::vector<double> out;
  for (int64_t row = 0; row < c.rows; ++row) {
    for (int64_t n = 0; n < c.N; ++n) {
      Real y = dot(layer.weight, row, n);
      if (c.bias) y += Real(to_float(layer.bias[n]));
      y = Mode::round(y);
      if (c.rank > 0) {
        int64_t split = 0, end = c.splits[0];
        while (n >= end) end += c.splits[++split];
        Real low = 0;
        for (int r = 0; r < c.rank; ++r) {
          low += Mode::round(dot(layer.a, row, split * c.rank + r)) * Real(to_float(layer.b[n * c.rank + r]));
        }
        y = Mode::round(y + Mode::round(Real(kScale) * Mode::round(low)));
      }
      out.push_back(y);
    }
  }
  return out;
}

// Calls run(parameters), y being where they lead.
template <typename T, typename Run>
void with_parameters(const Layer<T>& layer, const LinearCase& c, Buffer<T>& y, const Run& run) {
  const int splits = static_cast<int>(c.splits.size());
  Buffer<float> inner(c.rows * splits * c.rank);
  cuda::SkinnyLinearParams<T> p{.x = layer.x.data(),
                                .weight = layer.weight.data(),
                                .bias = c.bias ? layer.bias.data() : nullptr,
                                .y = y.data(),
                                .rows = c.rows,
                                .N = c.N,
                                .K = c.K,
                                .lora_a = layer.a.data(),
                                .lora_b = layer.b.data(),
                                .inner = inner.data(),
                                .scale = kScale,
                                .rank = c.rank,
                                .splits = splits,
                                .split_end = {}};
  int64_t end = 0;
  for (int i = 0; i < splits; ++i) p.split_end[i] = end += c.splits[i];
  run(p);
}

template <typename T>
Buffer<T> run_linear(const Layer<T>& layer, const LinearCase& c) {
  Buffer<T> y(c.rows * c.N, c.shift);
  with_parameters(layer, c, y, [](const auto& p) { cuda::skinny_linear(p, nullptr); });
  return y;
}

// act(y), or act(gate) up of y = gate | up, as torch writes it.
template <typename Mode>
std::vector<double> activate(const std::vector<double>& y, const LinearCase& c, Activation kind, bool gated) {
  using Real = typename Mode::Real;
  const auto act = [&](Real x) {
    switch (kind) {
      case Activation::kRelu: return std::max(x, Real(0));
      case Activation::kSilu: return x / (1 + std::exp(-x));
      case Activation::kGeluTanh: return x / 2 * (1 + std::tanh(Real(0.7978845608028654) * (x + Real(0.044715) * x * x * x)));
      case Activation::kGeluErf: return x / 2 * (1 + std::erf(x * Real(0.7071067811865476)));
    }
    return Real(NAN);
  };
  std::vector<double> out;
  const int64_t cols = gated ? c.N / 2 : c.N;
  for (int64_t i = 0; i < c.rows * cols; ++i) {
    const int64_t at = i / cols * c.N + i % cols;
    const Real value = Mode::round(act(static_cast<Real>(y[at])));
    out.push_back(gated ? Mode::round(value * static_cast<Real>(y[at + cols])) : value);
  }
  return out;
}

// Against fp64, and bit for bit against the linear layer and the activation one after another.
template <typename T>
void test_activation(const LinearCase& c, Activation kind, bool gated, Accuracy& accuracy) {
  const Layer<T> layer(c);
  const int64_t cols = gated ? c.N / 2 : c.N;
  const std::string what = std::string("linear_activation ") + kTypeName<T> + " " + c.name();
  const auto results = in_every_order(what, [&] {
    std::vector<Buffer<T>> out;
    out.emplace_back(c.rows * cols, c.shift);
    with_parameters(layer, c, out[0], [&](const auto& p) { cuda::skinny_linear_activation(p, kind, gated, nullptr); });
    return out;
  });
  accuracy.check(results[0], activate<Exact>(multiply<Exact>(layer, c), c, kind, gated),
                 activate<Plain<T>>(multiply<Plain<T>>(layer, c), c, kind, gated), what);
  const Buffer<T> before = run_linear(layer, c);
  Buffer<T> apart(c.rows * cols, c.shift);
  if (gated) {
    cuda::gated_activation<T>({before.data(), apart.data(), c.rows, cols}, kind, nullptr);
  } else {
    cuda::bias_activation<T>({before.data(), nullptr, apart.data(), c.rows, cols}, kind, nullptr);
  }
  expect(results[0].same_bits(apart), "the epilogue's bits are those of the two kernels");
}

template <typename T>
void test_linear(const LinearCase& c, Accuracy& accuracy) {
  const Layer<T> layer(c);
  const std::string what = std::string("linear ") + kTypeName<T> + " " + c.name();
  const auto results = in_every_order(what, [&] {
    std::vector<Buffer<T>> out;
    out.push_back(run_linear(layer, c));
    return out;
  });
  accuracy.check(results[0], multiply<Exact>(layer, c), multiply<Plain<T>>(layer, c), what);
}

template <typename T>
void test_own_bits() {
  const LinearCase together{13, 20, 300, true, 3, {7, 13}};
  const Layer<T> layer(together);
  const Buffer<T> all = run_linear(layer, together);
  for (int64_t row = 0; row < together.rows; ++row) {
    LinearCase alone = together;
    alone.rows = 1;
    Layer<T> single(alone);
    std::copy_n(layer.weight.data(), layer.weight.size(), single.weight.data());
    std::copy_n(layer.bias.data(), layer.bias.size(), single.bias.data());
    std::copy_n(layer.a.data(), layer.a.size(), single.a.data());
    std::copy_n(layer.b.data(), layer.b.size(), single.b.data());
    std::copy_n(layer.x.data() + row * together.K, together.K, single.x.data());
    const Buffer<T> one = run_linear(single, alone);
    expect(std::memcmp(one.data(), all.data() + row * together.N, together.N * sizeof(T)) == 0, "a row's bits are its own");
  }
}

template <typename T>
void test_type() {
  std::vector<LinearCase> cases = {{1, 1, 1},          {1, 16, 32, true},           {16, 17, 264, true, 2, {5, 12}},
                                   {9, 33, 70, false}, {8, 15, 257, true, 3, {15}}, {0, 4, 8},
                                   {3, 24, 40, false, 1, {3, 3, 3, 3, 3, 3, 3, 3}, 1}};
  if (full_grid()) {
    const std::vector<LinearCase> more = {{4, 48, 1024, true, 16, {16, 32}}, {16, 64, 576}, {7, 31, 2050, true}, {2, 5, 0, true}, {5, 0, 8}};
    cases.insert(cases.end(), more.begin(), more.end());
  }
  {
    Accuracy accuracy(std::string("linear ") + kTypeName<T>);
    for (const LinearCase& c : cases) test_linear<T>(c, accuracy);
  }
  test_own_bits<T>();
  Accuracy accuracy(std::string("linear_activation ") + kTypeName<T>);
  test_activation<T>({16, 17, 70, true, 2, {5, 12}}, Activation::kGeluErf, false, accuracy);
  test_activation<T>({3, 33, 40}, Activation::kRelu, false, accuracy);
  test_activation<T>({9, 34, 264, true, 3, {17, 17}}, Activation::kSilu, true, accuracy);
  test_activation<T>({1, 14, 33, true, 0, {}, 1}, Activation::kGeluTanh, true, accuracy);
  test_activation<T>({2, 16, 0, true}, Activation::kSilu, true, accuracy);
  test_activation<T>({0, 16, 8}, Activation::kSilu, true, accuracy);
  if (full_grid()) {
    test_activation<T>({7, 48, 520}, Activation::kSilu, false, accuracy);
    test_activation<T>({12, 64, 320, true, 8, {32, 32}}, Activation::kGeluTanh, true, accuracy);
  }
}

}  // namespace
}  // namespace hybrid::testing

int main() {
  hybrid::testing::for_each_type([](auto kind) { hybrid::testing::test_type<decltype(kind)>(); });
  return hybrid::testing::finish_simt("linear");
}
