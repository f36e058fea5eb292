// norm.cuh against its formulas: every dtype, with and without residual and bias, rows that do not fill or do not fit a block,
// arrays off the 16-byte boundary.
#include "norm/norm.cuh"

#include <functional>

#include "tests/simt/harness.h"

namespace hybrid::testing {
namespace {

constexpr float kEps = 1e-5f;

// Sums as torch does, in interleaved chains.
template <typename Real, typename Term>
Real sum(int64_t count, const Term& term) {
  Real chains[16] = {};
  for (int64_t i = 0; i < count; ++i) chains[i % 16] += term(i);
  Real total = 0;
  for (const Real chain : chains) total += chain;
  return total;
}

template <typename T>
struct Inputs {
  Buffer<T> x, residual, weight, bias, grad_y;
  Inputs(const GridCase& c, uint64_t seed)
      : x(c.rows * c.cols, c.shift), residual(c.rows * c.cols, c.shift), weight(c.cols, c.shift),
        bias(c.cols, c.shift), grad_y(c.rows * c.cols, c.shift) {
    Random random(seed);
    random.fill(x, 2.0, 0.5);
    random.fill(residual);
    random.fill(weight, 0.3, 1.0);
    random.fill(bias, 0.5);
    random.fill(grad_y);
  }
};

struct Variant {
  bool centered, residual, bias;
  std::string name() const {
    return std::string(centered ? "layer_norm" : "rms_norm") + (residual ? " residual" : "") + (bias ? " bias" : "");
  }
};

struct Reference {
  std::vector<double> y, sum, mean, rstd;
};

// torch.nn.functional's layer_norm and rms_norm: in float inside, rounded at the output; the residual is an addition before.
template <typename Mode, typename T>
Reference reference(const Inputs<T>& in, const Variant& v, int64_t rows, int64_t cols) {
  using Real = typename Mode::Real;
  Reference out;
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<Real> s(cols);
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t i = row * cols + c;
      s[c] = to_float(in.x[i]);
      if (v.residual) s[c] = Mode::round(s[c] + static_cast<Real>(to_float(in.residual[i])));
    }
    const Real mean = v.centered ? sum<Real>(cols, [&](int64_t c) { return s[c]; }) / Real(cols) : Real(0);
    const Real square = sum<Real>(cols, [&](int64_t c) { return (s[c] - mean) * (s[c] - mean); }) / Real(cols);
    const Real rstd = Real(1) / std::sqrt(square + Real(kEps));
    for (int64_t c = 0; c < cols; ++c) {
      Real y = (s[c] - mean) * rstd * Real(to_float(in.weight[c]));
      if (v.bias) y += Real(to_float(in.bias[c]));
      out.y.push_back(Mode::round(y));
      out.sum.push_back(s[c]);
    }
    out.mean.push_back(mean);
    out.rstd.push_back(rstd);
  }
  return out;
}

template <typename T>
void test_forward(const GridCase& c, const Variant& v, Accuracy& accuracy) {
  const Inputs<T> in(c, 17 * c.rows + c.cols);
  const std::string what = v.name() + " " + kTypeName<T> + " " + c.name();
  Buffer<float> mean(c.rows), rstd(c.rows);
  const auto results = in_every_order(what, [&] {
    std::vector<Buffer<T>> out;
    out.emplace_back(c.rows * c.cols, c.shift);
    out.emplace_back(v.residual ? c.rows * c.cols : 0, c.shift);
    mean.poison();
    rstd.poison();
    const cuda::NormParams<T> p{.x = in.x.data(),
                                .residual = v.residual ? in.residual.data() : nullptr,
                                .sum = v.residual ? out[1].data() : nullptr,
                                .weight = in.weight.data(),
                                .bias = v.bias ? in.bias.data() : nullptr,
                                .y = out[0].data(),
                                .mean = v.centered ? mean.data() : nullptr,
                                .rstd = rstd.data(),
                                .rows = c.rows,
                                .cols = c.cols,
                                .eps = kEps};
    v.centered ? cuda::layer_norm(p, nullptr) : cuda::rms_norm(p, nullptr);
    return out;
  });
  const Reference exact = reference<Exact>(in, v, c.rows, c.cols);
  const Reference plain = reference<Plain<T>>(in, v, c.rows, c.cols);
  accuracy.check(results[0], exact.y, plain.y, what);
  if (v.residual) accuracy.check(results[1], exact.sum, plain.sum, what + " sum");
  if (c.cols == 0 || v.residual) return;  // of the rounded sum, which y and test_fusion see to
  accuracy.check(rstd, exact.rstd, plain.rstd, what + " rstd");
  if (v.centered) accuracy.check(mean, exact.mean, plain.mean, what + " mean");
}

struct Gradients {
  std::vector<double> x, weight, bias;
};

template <typename Mode, typename T>
Gradients backward_reference(const Inputs<T>& in, const Reference& forward, bool centered, int64_t rows, int64_t cols) {
  using Real = typename Mode::Real;
  std::vector<Real> weight(cols), bias(cols);
  Gradients out;
  for (int64_t row = 0; row < rows; ++row) {
    const Real mean = static_cast<Real>(forward.mean[row]), rstd = static_cast<Real>(forward.rstd[row]);
    const auto grad = [&](int64_t c) { return Real(to_float(in.grad_y[row * cols + c])); };
    const auto weighted = [&](int64_t c) { return grad(c) * Real(to_float(in.weight[c])); };
    const auto n = [&](int64_t c) { return (Real(to_float(in.x[row * cols + c])) - mean) * rstd; };
    const Real slope = sum<Real>(cols, [&](int64_t c) { return weighted(c) * n(c); }) / Real(cols);
    const Real shift = centered ? sum<Real>(cols, weighted) / Real(cols) : Real(0);
    for (int64_t c = 0; c < cols; ++c) {
      out.x.push_back(Mode::round((weighted(c) - n(c) * slope - shift) * rstd));
      weight[c] += grad(c) * n(c);
      bias[c] += grad(c);
    }
  }
  for (const Real value : weight) out.weight.push_back(Mode::round(value));
  for (const Real value : bias) out.bias.push_back(Mode::round(value));
  return out;
}

template <typename T>
void test_backward(const GridCase& c, bool centered, Accuracy& accuracy) {
  const Inputs<T> in(c, 31 * c.rows + c.cols);
  const Variant v{centered, false, false};
  const std::string what = v.name() + "_backward " + kTypeName<T> + " " + c.name();
  const Reference forward = reference<Exact>(in, v, c.rows, c.cols);
  Buffer<float> mean(c.rows), rstd(c.rows);
  for (int64_t row = 0; row < c.rows; ++row) {
    mean[row] = static_cast<float>(forward.mean[row]);
    rstd[row] = static_cast<float>(forward.rstd[row]);
  }
  const auto results = in_every_order(what, [&] {
    std::vector<Buffer<T>> out;
    out.emplace_back(c.rows * c.cols, c.shift);
    out.emplace_back(c.cols, c.shift);
    out.emplace_back(centered ? c.cols : 0, c.shift);
    Buffer<float> partial(norm_backward_blocks(c.rows) * (centered ? 2 : 1) * c.cols);
    const cuda::NormBackwardParams<T> p{.grad_y = in.grad_y.data(),
                                        .x = in.x.data(),
                                        .weight = in.weight.data(),
                                        .mean = centered ? mean.data() : nullptr,
                                        .rstd = rstd.data(),
                                        .grad_x = out[0].data(),
                                        .grad_weight = out[1].data(),
                                        .grad_bias = centered ? out[2].data() : nullptr,
                                        .partial = partial.data(),
                                        .rows = c.rows,
                                        .cols = c.cols};
    centered ? cuda::layer_norm_backward(p, nullptr) : cuda::rms_norm_backward(p, nullptr);
    return out;
  });
  const Gradients exact = backward_reference<Exact>(in, forward, centered, c.rows, c.cols);
  const Gradients plain = backward_reference<Plain<T>>(in, forward, centered, c.rows, c.cols);
  accuracy.check(results[0], exact.x, plain.x, what);
  accuracy.check(results[1], exact.weight, plain.weight, what + " weight");
  if (centered) accuracy.check(results[2], exact.bias, plain.bias, what + " bias");
}

// Normalising with a residual gives the bits of adding, then normalising: training may do either.
template <typename T>
void test_fusion(const GridCase& c, bool centered) {
  const Inputs<T> in(c, 3);
  Buffer<T> fused(c.rows * c.cols), sum(c.rows * c.cols), separate(c.rows * c.cols);
  Buffer<float> mean(c.rows), rstd(c.rows), separate_mean(c.rows), separate_rstd(c.rows);
  cuda::NormParams<T> p{.x = in.x.data(),
                        .residual = in.residual.data(),
                        .sum = sum.data(),
                        .weight = in.weight.data(),
                        .bias = in.bias.data(),
                        .y = fused.data(),
                        .mean = mean.data(),
                        .rstd = rstd.data(),
                        .rows = c.rows,
                        .cols = c.cols,
                        .eps = kEps};
  centered ? cuda::layer_norm(p, nullptr) : cuda::rms_norm(p, nullptr);
  p.x = sum.data();
  p.residual = nullptr;
  p.sum = nullptr;
  p.y = separate.data();
  p.mean = separate_mean.data();
  p.rstd = separate_rstd.data();
  centered ? cuda::layer_norm(p, nullptr) : cuda::rms_norm(p, nullptr);
  expect(fused.same_bits(separate) && rstd.same_bits(separate_rstd), "fused and separate give the same bits");
  expect(!centered || mean.same_bits(separate_mean), "fused and separate give the same mean");
}

// The sum may be written over either of its terms.
template <typename T>
void test_in_place() {
  const GridCase c{3, 72};
  for (const bool over_x : {true, false}) {
    Inputs<T> in(c, 5), kept(c, 5);
    Buffer<T> y(c.rows * c.cols), expected(c.rows * c.cols), sum(c.rows * c.cols);
    cuda::NormParams<T> p{.x = in.x.data(),
                          .residual = in.residual.data(),
                          .sum = over_x ? in.x.data() : in.residual.data(),
                          .weight = in.weight.data(),
                          .bias = nullptr,
                          .y = y.data(),
                          .mean = nullptr,
                          .rstd = nullptr,
                          .rows = c.rows,
                          .cols = c.cols,
                          .eps = kEps};
    cuda::rms_norm(p, nullptr);
    p.x = kept.x.data();
    p.residual = kept.residual.data();
    p.sum = sum.data();
    p.y = expected.data();
    cuda::rms_norm(p, nullptr);
    expect(y.same_bits(expected) && sum.same_bits(over_x ? in.x : in.residual), "sum in place of a term");
  }
}

template <typename T>
void test_type() {
  std::vector<GridCase> grid = {{1, 1}, {3, 123}, {2, 64}, {33, 72}, {2, 513, 1}, {0, 8}, {2, 0}};
  if (full_grid()) {
    const std::vector<GridCase> more = {{5, 7},     {1, 4096},  {70, 8, 3}, {31, 65},    {2, 576},
                                        {2, 24584}, {3, 8192},  {2, 6200, 2}};
    grid.insert(grid.end(), more.begin(), more.end());
  }
  for (const bool centered : {false, true}) {
    const std::string name = std::string(centered ? "layer_norm" : "rms_norm");
    Accuracy forward(name + " " + kTypeName<T>), backward(name + "_backward " + kTypeName<T>);
    for (const GridCase& c : grid) {
      for (const Variant& v : {Variant{centered, false, false}, {centered, true, centered}, {centered, false, true}}) {
        test_forward<T>(c, v, forward);
      }
      test_backward<T>(c, centered, backward);
    }
    test_fusion<T>({2, 264}, centered);
    test_backward<T>({2, 11784}, centered, backward);  // the sums do not fit into shared memory
    test_forward<T>({1, 8193}, {centered, true, true}, forward);  // the row does not fit into registers
  }
  test_in_place<T>();
}

}  // namespace
}  // namespace hybrid::testing

int main() {
  hybrid::testing::for_each_type([](auto kind) { hybrid::testing::test_type<decltype(kind)>(); });
  return hybrid::testing::finish_simt("norm");
}
