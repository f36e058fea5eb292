// lora.cuh: the merge against fp64, and the restore bit for bit: over every number of the 16-bit formats, every exponent of fp32,
// NaNs with their payload.
#include "lora/lora.cuh"

#include "tests/simt/harness.h"

namespace hybrid::testing {
namespace {

struct Adapter {
  Buffer<float> a, b;
  cuda::LoraParams params;

  Adapter(int64_t rows, int64_t cols, int rank, std::vector<int64_t> splits, float scale, uint64_t seed)
      : a(static_cast<int64_t>(splits.size()) * rank * cols), b(rows * rank) {
    Random random(seed);
    random.fill(a);
    random.fill(b);
    params = {.a = a.data(), .b = b.data(), .scale = scale, .rank = rank, .rows = rows, .cols = cols,
              .splits = static_cast<int>(splits.size()), .split_end = {}};
    int64_t end = 0;
    for (size_t i = 0; i < splits.size(); ++i) params.split_end[i] = end += splits[i];
  }

  template <typename Real>
  Real delta(int64_t row, int64_t col) const {
    int64_t split = 0;
    while (row >= params.split_end[split]) ++split;
    Real sum = 0;
    for (int r = 0; r < params.rank; ++r) {
      sum += Real(b[row * params.rank + r]) * Real(a[(split * params.rank + r) * params.cols + col]);
    }
    return Real(params.scale) * sum;
  }
};

struct Shape {
  int64_t rows, cols;
  int rank;
  std::vector<int64_t> splits;
  int64_t shift = 0;
  std::string name() const { return GridCase{rows, cols, shift}.name() + " rank " + std::to_string(rank); }
};

template <typename T>
void test_merge(const Shape& s, Accuracy& accuracy) {
  const Adapter adapter(s.rows, s.cols, s.rank, s.splits, 0.5f, 7);
  Buffer<T> weight(s.rows * s.cols, s.shift);
  Random(11).fill(weight, 0.5);
  const std::string what = std::string("merge ") + kTypeName<T> + " " + s.name();
  const auto results = in_every_order(what, [&] {
    std::vector<Buffer<T>> out;
    out.emplace_back(s.rows * s.cols, s.shift);
    cuda::lora_merge(adapter.params, weight.data(), out[0].data(), nullptr);
    return out;
  });
  const auto expected = [&](auto mode) {
    using Mode = decltype(mode);
    using Real = typename Mode::Real;
    std::vector<double> out;
    for (int64_t i = 0; i < s.rows * s.cols; ++i) {
      const Real delta = Mode::round(adapter.delta<Real>(i / s.cols, i % s.cols));
      out.push_back(Mode::round(Real(to_float(weight[i])) + delta));
    }
    return out;
  };
  accuracy.check(results[0], expected(Exact{}), expected(Plain<T>{}), what);
}

// Numbers of a format in the order of their values, counted from zero; the two zeros are neighbours.
template <typename T>
int64_t rank_of(float value) {
  const T number = round_to<T>(value);
  uint32_t bits = 0;
  std::memcpy(&bits, &number, sizeof(T));
  const uint32_t sign = 1u << (8 * sizeof(T) - 1);
  return bits & sign ? -1 - static_cast<int64_t>(bits & ~sign) : static_cast<int64_t>(bits);
}

// How many weights need an escape, by definition, with delta computed as lora_cuda.h says.
template <typename T>
int64_t expected_escapes(const Adapter& adapter, const Buffer<T>& base) {
  const cuda::LoraParams& p = adapter.params;
  int64_t count = 0;
  for (int64_t i = 0; i < base.size(); ++i) {
    const int64_t row = i / p.cols, col = i % p.cols;
    int64_t split = 0;
    while (row >= p.split_end[split]) ++split;
    float sum = 0.0f;
    for (int r = 0; r < p.rank; ++r) {
      sum = std::fma(adapter.b[row * p.rank + r], adapter.a[(split * p.rank + r) * p.cols + col], sum);
    }
    const float delta = p.scale * sum, old = to_float(base[i]);
    const float merged = cuda::rounded<T>(old + delta), near = cuda::rounded<T>(merged - delta);
    const bool finite = std::isfinite(old) && std::isfinite(merged) && std::isfinite(near);
    count += !finite || std::abs(rank_of<T>(old) - rank_of<T>(near)) > 127;
  }
  return count;
}

int restored = 0;

// Merges in place and out again; the merge gives the bits of the one into other storage.
template <typename T>
int64_t test_restore(const Adapter& adapter, const Buffer<T>& base, int64_t shift, const std::string& what) {
  const cuda::LoraParams& p = adapter.params;
  Buffer<T> weight(base.size(), shift), merged(base.size(), shift);
  std::copy_n(base.data(), base.size(), weight.data());
  cuda::lora_merge(p, weight.data(), merged.data(), nullptr);

  const int64_t tiles = cuda::lora_tiles(p.rows, p.cols, sizeof(T));
  Buffer<int64_t> offsets(tiles + 1);
  cuda::lora_count_escapes(p, weight.data(), offsets.data(), nullptr);
  expect(weight.same_bits(base), "counting leaves the weight alone");
  const int64_t count = offsets[tiles];
  expect(offsets[0] == 0 && count == expected_escapes(adapter, base), "the number of escapes");
  Buffer<int64_t> index(count);
  Buffer<T> value(count);
  Buffer<int8_t> residual(base.size());
  const cuda::LoraEscapes<T> escapes{index.data(), value.data()};
  cuda::lora_merge_in_place(p, weight.data(), residual.data(), offsets.data(), escapes, nullptr);
  bool equal = true;
  for (int64_t i = 0; i < base.size(); ++i) {
    const float here = to_float(weight[i]), there = to_float(merged[i]);
    equal = equal && (here == there || (std::isnan(here) && std::isnan(there)));
  }
  expect(equal, "both merges give the same weights");
  std::vector<bool> seen(base.size());
  for (int64_t e = 0; e < count; ++e) {
    const bool fresh = index[e] >= 0 && index[e] < base.size() && !seen[index[e]];
    expect(fresh, "every escape has a place of its own");
    if (fresh) seen[index[e]] = true;
  }
  cuda::lora_unmerge_in_place(p, weight.data(), residual.data(), escapes, count, nullptr);
  ++restored;
  if (!weight.same_bits(base)) {
    std::fprintf(stderr, "%s: the base is not restored\n", what.c_str());
    expect(false, "restore");
  }
  return count;
}

template <typename T>
void test_restore_shapes(const std::vector<Shape>& shapes) {
  for (const Shape& s : shapes) {
    for (const float scale : {0.001f, 1.0f}) {
      const Adapter adapter(s.rows, s.cols, s.rank, s.splits, scale, 13);
      Buffer<T> base(s.rows * s.cols);
      Random(17).fill(base, 0.02);
      test_restore(adapter, base, s.shift, std::string("restore ") + kTypeName<T> + " " + s.name());
    }
  }
}

// Every bit pattern of a 16-bit format, and of fp32 every exponent with both signs, met by deltas of several sizes.
template <typename T>
void test_every_number() {
  constexpr int64_t kRows = 64;
  const int64_t cols = sizeof(T) == 2 ? 1024 : 64;
  Buffer<T> base(kRows * cols);
  Random random(19);
  for (int64_t i = 0; i < base.size(); ++i) {
    const uint32_t bits = sizeof(T) == 2 ? static_cast<uint32_t>(i)
                                         : static_cast<uint32_t>(i % 512) << 23 | (random.bits() & 0x7fffffu);
    std::memcpy(&base[i], &bits, sizeof(T));  // little end first
  }
  if (sizeof(T) == 4) std::fill_n(base.data(), 2, T{});  // zero is among the 16-bit patterns
  int64_t escapes = 0;
  for (const float scale : {0.0f, 1e-30f, 1e-6f, 0.01f, 100.0f, 1e30f}) {
    const Adapter adapter(kRows, cols, 2, {kRows}, scale, 23);
    escapes += test_restore(adapter, base, 0, std::string("every number ") + kTypeName<T>);
  }
  expect(escapes > 0, "some numbers need an escape");
}

// A factor that is not finite makes whole rows into escapes, and nothing beyond them.
template <typename T>
void test_infinite_factor() {
  Adapter adapter(9, 70, 2, {9}, 1.0f, 29);
  adapter.b[3] = INFINITY;
  Buffer<T> base(9 * 70);
  Random(31).fill(base);
  expect(test_restore(adapter, base, 0, "infinite factor") >= 70, "a row of escapes");
}

template <typename T>
void test_type() {
  std::vector<Shape> shapes = {{1, 1, 1, {1}},           {9, 70, 4, {2, 3, 4}}, {33, 264, 3, {33}},
                               {40, 8, 8, {1, 2, 3, 4, 5, 6, 7, 12}}, {5, 64, 0, {5}},       {12, 24, 2, {6, 6}, 1}};
  if (full_grid()) {
    shapes.push_back({70, 513, 16, {30, 40}});
    shapes.push_back({64, 512, 8, {63, 1}});
  }
  {
    Accuracy accuracy(std::string("lora_merge ") + kTypeName<T>);
    for (const Shape& s : shapes) test_merge<T>(s, accuracy);
    test_merge<T>({0, 8, 2, {}}, accuracy);
  }
  restored = 0;
  test_restore_shapes<T>(shapes);
  test_every_number<T>();
  test_infinite_factor<T>();
  test_restore(Adapter(0, 8, 2, {}, 1.0f, 37), Buffer<T>(0), 0, "no rows");
  test_restore(Adapter(5, 0, 2, {5}, 1.0f, 41), Buffer<T>(0), 0, "no columns");
  report_exact(std::string("lora_merge_ ") + kTypeName<T>, restored);
}

}  // namespace
}  // namespace hybrid::testing

int main() {
  hybrid::testing::for_each_type([](auto kind) { hybrid::testing::test_type<decltype(kind)>(); });
  return hybrid::testing::finish_simt("lora");
}
