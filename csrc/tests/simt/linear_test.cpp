// The linear layer of a few rows against fp64: 1 to 16 rows, widths around 16 outputs, 32 columns and what 8 warps share, with and
// without a bias and a low-rank term in splits; and a row's bits do not depend on the others.
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

template <typename T>
Buffer<T> run_linear(const Layer<T>& layer, const LinearCase& c) {
  Buffer<T> y(c.rows * c.N, c.shift);
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
  cuda::skinny_linear(p, nullptr);
  return y;
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
}

}  // namespace
}  // namespace hybrid::testing

int main() {
  hybrid::testing::for_each_type([](auto kind) { hybrid::testing::test_type<decltype(kind)>(); });
  return hybrid::testing::finish_simt("linear");
}
