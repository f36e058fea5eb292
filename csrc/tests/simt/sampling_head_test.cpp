// Draws from the head of a few rows against the draws from its logits: the same tokens; scores against fp64. Vocabularies around a tile
// of 16 and a block of 64; impossible tokens, a whole block of them; rows that are no distribution.
#include "sampling/skinny_head.cuh"
#include "tests/simt/sampling_cases.h"

namespace hybrid::testing {
namespace {

struct HeadCase {
  int64_t rows, vocab, width, shift = 0;
  std::string name() const {
    return "[" + std::to_string(rows) + ", " + std::to_string(width) + "] x [" + std::to_string(vocab) + "] shift " +
           std::to_string(shift);
  }
};

template <typename T>
struct Head {
  Buffer<T> x, weight, logits;
  Buffer<int64_t> ids, positions;

  // Column 0 makes tokens impossible: x has 1 there.
  Head(const HeadCase& c, bool impossible)
      : x(c.rows * c.width, c.shift), weight(c.vocab * c.width, c.shift), logits(c.rows * c.vocab), ids(c.rows), positions(c.rows) {
    Random random(97 + c.vocab);
    random.fill(x);
    random.fill(weight, 2.0 / std::sqrt(static_cast<double>(c.width)));
    for (int64_t i = 0; i < c.rows; ++i) {
      ids[i] = (int64_t{1} << 40) + 3 * i;
      positions[i] = 5 + i;
      x[i * c.width] = round_to<T>(1.0f);
    }
    for (int64_t i = 0; impossible && i < c.vocab; ++i) {
      if (i % 7 == 3 || (i >= 64 && i < 128)) weight[i * c.width] = round_to<T>(-INFINITY);
    }
  }

  void multiply(const HeadCase& c) {
    cuda::SkinnyLinearParams<T> p{};
    p.x = x.data();
    p.weight = weight.data();
    p.y = logits.data();
    p.rows = c.rows;
    p.N = c.vocab;
    p.K = c.width;
    cuda::skinny_linear(p, nullptr);
  }
};

struct Draws {
  Buffer<int64_t> token;
  std::vector<Buffer<float>> scores;  // logprob, entropy, kept mass, threshold, kept logprob

  explicit Draws(int64_t rows) : token(rows) {
    for (int i = 0; i < 5; ++i) scores.emplace_back(rows);
  }
};

template <typename T>
Draws draw_from_head(const Head<T>& head, const HeadCase& c, const SamplingRule& rule) {
  Draws draws(c.rows);
  Buffer<cuda::HeadBlock> blocks(c.rows * cuda::ceil_div(c.vocab, 64));
  auto& s = draws.scores;
  cuda::sample_skinny_head<T>({head.x.data(), head.weight.data(), rule.temperature, rule.seed, head.ids.data(), head.positions.data(),
                               blocks.data(), draws.token.data(), s[0].data(), s[1].data(), s[2].data(), s[3].data(), s[4].data(),
                               c.rows, c.vocab, c.width},
                              nullptr);
  return draws;
}

template <typename T>
Draws draw_from_logits(const Head<T>& head, const HeadCase& c, const SamplingRule& rule) {
  Draws draws(c.rows);
  auto& s = draws.scores;
  cuda::sample<T>({head.logits.data(), rule, head.ids.data(), head.positions.data(), draws.token.data(), s[0].data(), s[1].data(),
                   s[2].data(), s[3].data(), s[4].data(), c.rows, c.vocab},
                  nullptr);
  return draws;
}

template <typename T>
void test_head(const HeadCase& c, float temperature, Accuracy& accuracy) {
  Head<T> head(c, /*impossible=*/true);
  head.multiply(c);
  const SamplingRule rule{temperature, 0, 1.0f, 21};
  const std::string what = std::string("linear_sample ") + kTypeName<T> + " " + c.name();
  Buffer<int64_t> token(c.rows);
  const auto scores = in_every_order(what, [&] {
    Draws draws = draw_from_head(head, c, rule);
    std::copy_n(draws.token.data(), c.rows, token.data());
    return std::move(draws.scores);
  });
  const Draws expected = draw_from_logits(head, c, rule);
  expect(token.same_bits(expected.token), "the tokens that the logits give");
  expect(scores[2].same_bits(expected.scores[2]) && scores[3].same_bits(expected.scores[3]), "nothing is cut");
  expect(scores[4].same_bits(scores[0]), "so both log-probabilities are one");
  std::vector<double> exact[2], plain[2];
  const double scale = temperature == 0.0f ? 1.0 : temperature;
  for (int64_t row = 0; row < c.rows; ++row) {
    const std::vector<double> x = row_of(head.logits, row, c.vocab);
    const Distribution e = distribution<Exact>(x, scale), p = distribution<Plain<float>>(x, scale);
    exact[0].push_back(scored<Exact>(e, x[expected.token[row]]));
    plain[0].push_back(scored<Plain<float>>(p, x[expected.token[row]]));
    exact[1].push_back(e.entropy);
    plain[1].push_back(static_cast<float>(p.entropy));
  }
  accuracy.check(scores[0], exact[0], plain[0], what + " logprob");
  accuracy.check(scores[1], exact[1], plain[1], what + " entropy");
}

// Equal logits: the first of the greatest.
template <typename T>
void test_ties() {
  const HeadCase c{2, 150, 8};
  Head<T> head(c, /*impossible=*/false);
  for (const int64_t token : {40, 41, 100, 149}) {
    for (int64_t k = 0; k < c.width; ++k) head.weight[token * c.width + k] = round_to<T>(k == 0 ? 30.0f : 0.0f);
  }
  const Draws draws = draw_from_head(head, c, {0.0f, 0, 1.0f, 1});
  expect(draws.token[0] == 40 && draws.token[1] == 40, "the first of the greatest logits");
}

// NaN, +inf, or nothing but -inf; their neighbours have a token.
template <typename T>
void test_no_distribution() {
  const HeadCase c{5, 70, 16};
  Head<T> head(c, /*impossible=*/false);
  head.weight[66 * c.width] = round_to<T>(-INFINITY);
  head.x[c.width + 3] = round_to<T>(NAN);
  head.x[2 * c.width] = round_to<T>(-1.0f);  // times -inf
  for (int64_t token = 0; token < c.vocab; ++token) head.weight[token * c.width + 1] = round_to<T>(1.0f);
  head.x[3 * c.width + 1] = round_to<T>(-INFINITY);
  for (const float temperature : {1.0f, 0.0f}) {
    const Draws draws = draw_from_head(head, c, {temperature, 0, 1.0f, 1});
    for (int64_t row = 0; row < c.rows; ++row) {
      const bool good = row == 0 || row == 4;
      expect(good == (draws.token[row] >= 0), "no distribution, no token");
      for (const Buffer<float>& score : draws.scores) expect(good == !std::isnan(score[row]), "and no score");
    }
  }
}

template <typename T>
void test_type() {
  Accuracy accuracy(std::string("linear_sample ") + kTypeName<T>, 1);
  std::vector<HeadCase> cases = {{1, 1, 8}, {3, 70, 24}, {16, 145, 40}, {9, 65, 33, 1}, {0, 8, 8}};
  if (full_grid()) {
    const std::vector<HeadCase> more = {{2, 63, 300}, {7, 64, 256}, {12, 5000, 16}, {16, 1025, 72}};
    cases.insert(cases.end(), more.begin(), more.end());
  }
  for (const HeadCase& c : cases) {
    for (const float temperature : {1.0f, 0.6f, 0.0f}) test_head<T>(c, temperature, accuracy);
  }
  test_ties<T>();
  test_no_distribution<T>();
}

}  // namespace
}  // namespace hybrid::testing

int main() {
  hybrid::testing::for_each_type([](auto kind) { hybrid::testing::test_type<decltype(kind)>(); });
  return hybrid::testing::finish_simt("sampling_head");
}
