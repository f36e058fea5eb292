// Scoring against fp64; sampling against the races of race.h run in double on the same uniforms, with thresholds found by sorting:
// the same tokens must come out. Vocabularies around a block of 64 and around what a block of threads reads at once; ties at the
// threshold, and logits that no other number lies between; rows where one token more would change everything; rows that are no
// distribution.
#include "sampling/sampling.cuh"

#include <map>

#include "tests/simt/sampling_cases.h"

namespace hybrid::testing {
namespace {

// Rows of logits with impossible tokens among them; `step` > 0 rounds them to its multiples, so that many are equal.
template <typename T>
Buffer<T> random_logits(int64_t rows, int64_t vocab, int64_t shift, double step, uint64_t seed) {
  Buffer<T> logits(rows * vocab, shift);
  Random random(seed);
  random.fill(logits, 3.0, 1.0);
  for (int64_t i = 0; i < logits.size(); ++i) {
    if (step > 0.0) logits[i] = round_to<T>(static_cast<float>(std::round(to_float(logits[i]) / step) * step));
    if (i % 7 == 3) logits[i] = round_to<T>(-INFINITY);
  }
  return logits;
}

template <typename T>
void test_scores(const GridCase& c, float temperature, bool cuts, Accuracy& forward, Accuracy& backward) {
  const Buffer<T> logits = random_logits<T>(c.rows, c.cols, c.shift, 0.0, 71);
  Buffer<int64_t> targets(c.rows);
  Buffer<float> grad_logprob(c.rows), grad_entropy(c.rows), entropy(c.rows), thresholds(c.rows), held(c.rows);
  Buffer<double> lse(c.rows);
  Random random(73);
  random.fill(grad_logprob);
  random.fill(grad_entropy);
  for (int64_t i = 0; i < c.rows; ++i) {
    targets[i] = static_cast<int64_t>(random.bits() % c.cols);
    thresholds[i] = to_float(logits[i * c.cols + static_cast<int64_t>(random.bits() % c.cols)]);
  }
  const std::string what = std::string("token_logprobs ") + kTypeName<T> + " " + c.name() + (cuts ? " cut" : "");
  const auto scores = in_every_order(what, [&] {
    std::vector<Buffer<float>> out;
    for (int i = 0; i < 2; ++i) out.emplace_back(c.rows);
    lse.poison();
    cuda::token_logprobs<T>({logits.data(), targets.data(), cuts ? thresholds.data() : nullptr, out[0].data(), out[1].data(),
                             lse.data(), held.data(), c.rows, c.cols, temperature},
                            nullptr);
    return out;
  });
  std::vector<double> exact[4], plain[4];  // log-probability, entropy, log-sum-exp, gradient
  for (int64_t row = 0; row < c.rows; ++row) {
    const std::vector<double> x = row_of(logits, row, c.cols);
    const double target = x[targets[row]], least = cuts ? std::min<double>(target, thresholds[row]) : -INFINITY;
    const Distribution e = distribution<Exact>(x, temperature, least), p = distribution<Plain<float>>(x, temperature, least);
    expect(held[row] == least, "the threshold that held");
    if (target > -INFINITY) {
      exact[0].push_back(scored<Exact>(e, target));
      plain[0].push_back(scored<Plain<float>>(p, target));
    } else {
      expect(scores[0][row] == -INFINITY, "an impossible target");
      exact[0].push_back(0.0);
      plain[0].push_back(0.0);
    }
    exact[1].push_back(e.entropy);
    plain[1].push_back(static_cast<float>(p.entropy));
    exact[2].push_back(e.max / temperature + e.log_sum);
    entropy[row] = static_cast<float>(e.entropy);
    expect(std::abs(lse[row] - exact[2].back()) <= 1e-6 * (1.0 + std::abs(exact[2].back())), "log-sum-exp");
    for (int64_t i = 0; i < c.cols; ++i) {
      const auto gradient = [&](double share, double log_share, double entropy) {
        const double of_share = share > 0.0 ? share * (grad_logprob[row] + grad_entropy[row] * (log_share + entropy)) : 0.0;
        return ((i == targets[row] ? grad_logprob[row] : 0.0) - of_share) / temperature;
      };
      exact[3].push_back(gradient(e.weights[i] / e.sum, e.logprob(x[i]), e.entropy));
      const float share = static_cast<float>(p.weights[i]) / static_cast<float>(p.sum);
      const double rough = gradient(share, static_cast<float>(scored<Plain<float>>(p, x[i])), static_cast<float>(p.entropy));
      plain[3].push_back(cuda::rounded<T>(static_cast<float>(rough)));
    }
    lse[row] = exact[2].back();
  }
  Buffer<float> logprob(c.rows);
  for (int64_t i = 0; i < c.rows; ++i) logprob[i] = scores[0][i] > -INFINITY ? scores[0][i] : 0.0f;
  forward.check(logprob, exact[0], plain[0], what);
  forward.check(scores[1], exact[1], plain[1], what + " entropy");
  const auto grads = in_every_order(what + " backward", [&] {
    std::vector<Buffer<T>> out;
    out.emplace_back(c.rows * c.cols, c.shift);
    cuda::token_logprobs_backward<T>({grad_logprob.data(), grad_entropy.data(), logits.data(), targets.data(), entropy.data(),
                                      lse.data(), held.data(), out[0].data(), c.rows, c.cols, temperature},
                                     nullptr);
    return out;
  });
  backward.check(grads[0], exact[3], plain[3], what + " backward");
}

struct Expected {
  int64_t token;
  double kept_mass, threshold;
};

// The least logit of the smallest set of greatest logits whose measures reach `wanted`.
template <typename Measure>
double least_kept(const std::vector<double>& row, double above, double wanted, const Measure& measure) {
  std::map<double, double, std::greater<>> steps;  // measure of each value of a logit, greatest first
  for (size_t i = 0; i < row.size(); ++i) {
    if (row[i] >= above) steps[row[i]] += measure(i);
  }
  double sum = 0.0, least = 0.0;
  for (const auto& [logit, step] : steps) {
    least = logit;
    if ((sum += step) >= wanted) break;
  }
  return least;
}

Expected expected_sample(const std::vector<double>& row, const SamplingRule& rule, uint64_t id, uint32_t position) {
  const double temperature = rule.temperature == 0.0f ? 1.0 : rule.temperature;
  const Distribution d = distribution<Exact>(row, temperature);
  const auto vocab = std::ssize(row);
  if (rule.temperature == 0.0f) {
    return {std::find(row.begin(), row.end(), d.max) - row.begin(), 1.0, -INFINITY};
  }
  double least = -INFINITY;
  const auto mass = [&] {
    double sum = 0.0;
    for (int64_t i = 0; i < vocab; ++i) sum += row[i] >= least ? d.weights[i] : 0.0;
    return sum;
  };
  if (rule.top_k > 0 && rule.top_k < vocab) least = least_kept(row, least, rule.top_k, [](size_t) { return 1.0; });
  if (rule.top_p < 1.0f) least = least_kept(row, least, rule.top_p * mass(), [&](size_t i) { return d.weights[i]; });

  RaceUniforms uniforms(rule.seed, id, position);
  const auto weight = [&](int64_t i) { return row[i] >= least ? d.weights[i] : 0.0; };
  Race blocks, tokens;
  for (int64_t begin = 0; begin < vocab; begin += 64) {
    double sum = 0.0;
    for (int64_t i = begin; i < std::min<int64_t>(vocab, begin + 64); ++i) sum += weight(i);
    blocks.enter(begin / 64, sum, uniforms.of_block(begin / 64));
  }
  for (int64_t i = 64 * blocks.winner(); i < std::min<int64_t>(vocab, 64 * blocks.winner() + 64); ++i) {
    tokens.enter(i, weight(i), uniforms.of_token(i));
  }
  return {tokens.winner(), mass() / d.sum, least};
}

template <typename T>
void test_sample(const GridCase& c, const Buffer<T>& logits, const SamplingRule& rule, Accuracy& accuracy) {
  Buffer<int64_t> ids(c.rows), positions(c.rows);
  for (int64_t i = 0; i < c.rows; ++i) {
    ids[i] = (int64_t{1} << 40) + 3 * i;
    positions[i] = 5 + i;
  }
  const std::string what = std::string("sample ") + kTypeName<T> + " " + c.name() + " k " + std::to_string(rule.top_k) + " p " +
                           std::to_string(rule.top_p) + " T " + std::to_string(rule.temperature);
  Buffer<int64_t> token(c.rows);
  const auto results = in_every_order(what, [&] {
    std::vector<Buffer<float>> out;
    for (int i = 0; i < 5; ++i) out.emplace_back(c.rows);
    token.poison();
    cuda::sample<T>({logits.data(), rule, ids.data(), positions.data(), token.data(), out[0].data(), out[1].data(),
                     out[2].data(), out[3].data(), out[4].data(), c.rows, c.cols},
                    nullptr);
    return out;
  });
  std::vector<double> exact[4], plain[4];
  for (int64_t row = 0; row < c.rows; ++row) {
    const std::vector<double> x = row_of(logits, row, c.cols);
    const Expected e = expected_sample(x, rule, ids[row], static_cast<uint32_t>(positions[row]));
    expect(token[row] == e.token, "the token that the race gives");
    expect(results[3][row] == e.threshold, "the least logit kept");
    if (token[row] != e.token || results[3][row] != e.threshold) {
      std::fprintf(stderr, "%s: token %ld, expected %ld; threshold %g, expected %g\n", what.c_str(), long{token[row]},
                   long{e.token}, results[3][row], e.threshold);
    }
    const double temperature = rule.temperature == 0.0f ? 1.0 : rule.temperature;
    const Distribution d = distribution<Exact>(x, temperature), p = distribution<Plain<float>>(x, temperature);
    exact[0].push_back(scored<Exact>(d, x[e.token]));
    plain[0].push_back(scored<Plain<float>>(p, x[e.token]));
    exact[1].push_back(d.entropy);
    plain[1].push_back(static_cast<float>(p.entropy));
    exact[2].push_back(e.kept_mass);
    plain[2].push_back(static_cast<float>(e.kept_mass));
    exact[3].push_back(scored<Exact>(distribution<Exact>(x, temperature, e.threshold), x[e.token]));
    plain[3].push_back(scored<Plain<float>>(distribution<Plain<float>>(x, temperature, e.threshold), x[e.token]));
  }
  accuracy.check(results[0], exact[0], plain[0], what + " logprob");
  accuracy.check(results[1], exact[1], plain[1], what + " entropy");
  accuracy.check(results[2], exact[2], plain[2], what + " kept mass");
  accuracy.check(results[4], exact[3], plain[3], what + " kept logprob");
}

// Rows of the same logits, six more than a block of 64 has.
constexpr int64_t kOddVocab = 70;
template <typename T, typename Logit>
Buffer<T> equal_rows(int64_t rows, const Logit& logit) {
  Buffer<T> logits(rows * kOddVocab);
  for (int64_t i = 0; i < logits.size(); ++i) logits[i] = round_to<T>(static_cast<float>(logit(i % kOddVocab)));
  return logits;
}

// Logits in a row that no other number of their type lies between, from 1 on, in no order: a threshold that is off by one is off
// by a token. Two greater ones, so that the search narrows down to fewer numbers than there are.
template <typename T>
void test_neighbours(Accuracy& accuracy) {
  const auto logit = [](int64_t i) {
    if (i < 2) return 1.75 + 0.125 * static_cast<double>(i);
    return 1.0 + static_cast<double>(i * 27 % kOddVocab) * kUlp<T>;
  };
  const Buffer<T> logits = equal_rows<T>(1, logit);
  const GridCase c{1, kOddVocab};
  for (const int k : {1, 5, 33, 69, 70}) test_sample<T>(c, logits, {1.0f, k, 1.0f, 21}, accuracy);
  for (int i = 1; i < 14; ++i) {
    const float p = 0.0747f * static_cast<float>(i);
    test_sample<T>(c, logits, {1.0f, 0, p, 22}, accuracy);
    test_sample<T>(c, logits, {1.0f, 7, p, 23}, accuracy);
  }
  Buffer<int64_t> target(1);
  Buffer<float> threshold(1), logprob(1), entropy(1), held(1);
  Buffer<double> lse(1);
  target[0] = 61;
  threshold[0] = static_cast<float>(logit(60));
  cuda::token_logprobs<T>({logits.data(), target.data(), threshold.data(), logprob.data(), entropy.data(), lse.data(), held.data(), 1,
                           kOddVocab, 1.0f},
                          nullptr);
  expect(held[0] == threshold[0], "the threshold, which is the lower one");
}

// A logit of 0 beyond the row, or a token beyond the block that won, would take part in half of the draws.
template <typename T>
void test_nothing_beyond(Accuracy& accuracy) {
  const GridCase c{16, kOddVocab};
  const SamplingRule all{1.0f, 0, 1.0f, 24};
  test_sample<T>(c, equal_rows<T>(c.rows, [](int64_t i) { return i == 0 ? 0.0 : -INFINITY; }), all, accuracy);
  test_sample<T>(c, equal_rows<T>(c.rows, [](int64_t i) { return i < 64 ? 0.0 : i == 64 ? 4.0 : -INFINITY; }), all, accuracy);
}

// A row with NaN, +inf or nothing but -inf has no token; its neighbours do. Nor has a target outside the vocabulary a score.
template <typename T>
void test_no_distribution() {
  constexpr int64_t kVocab = kOddVocab;
  Buffer<T> logits(5 * kVocab);
  Random(83).fill(logits);
  logits[66] = round_to<T>(NAN);
  logits[2 * kVocab + 1] = round_to<T>(INFINITY);
  std::fill_n(&logits[3 * kVocab], kVocab, round_to<T>(-INFINITY));
  Buffer<int64_t> ids(5), positions(5), token(5);
  for (int64_t i = 0; i < 5; ++i) ids[i] = positions[i] = i;
  for (const SamplingRule& rule : {SamplingRule{1.0f, 0, 1.0f, 1}, {0.0f, 0, 1.0f, 1}, {1.0f, 5, 0.5f, 1}}) {
    Buffer<float> logprob(5), entropy(5), mass(5), threshold(5), kept(5);
    cuda::sample<T>({logits.data(), rule, ids.data(), positions.data(), token.data(), logprob.data(), entropy.data(),
                     mass.data(), threshold.data(), kept.data(), 5, kVocab},
                    nullptr);
    for (int64_t i = 0; i < 5; ++i) {
      const bool good = i == 1 || i == 4;
      expect(good == (token[i] >= 0) && good == !std::isnan(logprob[i]) && good == !std::isnan(entropy[i]) &&
                 good == !std::isnan(mass[i]) && good == !std::isnan(threshold[i]) && good == !std::isnan(kept[i]),
             "a row that is no distribution");
    }
  }
  Buffer<int64_t> targets(5);
  Buffer<float> logprob(5), entropy(5), held(5);
  Buffer<double> lse(5);
  for (int64_t i = 0; i < 5; ++i) targets[i] = i == 0 ? -1 : i == 4 ? kVocab : 0;
  cuda::token_logprobs<T>({logits.data(), targets.data(), nullptr, logprob.data(), entropy.data(), lse.data(), held.data(), 5,
                           kVocab, 1.0f},
                          nullptr);
  for (int64_t i = 0; i < 5; ++i) {
    expect(std::isnan(logprob[i]) == (i != 1), "the score of a row that is no distribution, or of no token");
    expect(std::isnan(entropy[i]) == (i != 1 && i != 4), "the entropy of a row that is no distribution");
  }
}

template <typename T>
void test_type() {
  std::vector<GridCase> grid = {{2, 70}, {1, 1}, {2, 64}, {1, 2056}, {1, 1003, 1}, {0, 8}};
  if (full_grid()) {
    const std::vector<GridCase> more = {{1, 63}, {1, 65}, {1, 2048}, {1, 4104}, {2, 5003}};
    grid.insert(grid.end(), more.begin(), more.end());
  }
  const std::string type = kTypeName<T>;
  Accuracy forward("token_logprobs " + type, 1), backward("token_logprobs_backward " + type), sample("sample " + type, 1);
  for (const GridCase& c : grid) {
    test_scores<T>(c, 1.0f, false, forward, backward);
    test_scores<T>(c, 0.7f, true, forward, backward);
    const auto logits = [&](double step) { return random_logits<T>(c.rows, c.cols, c.shift, step, 79 + c.cols); };
    for (const SamplingRule& rule : {SamplingRule{1.0f, 0, 1.0f, 11}, {0.6f, 0, 1.0f, 12}, {0.0f, 7, 0.5f, 13}, {0.9f, 5, 1.0f, 14},
                                     {1.3f, 0, 0.8f, 15}, {1.0f, 40, 0.6f, 16}, {1.0f, 1 << 20, 1.0f, 17}, {1.0f, 50, 1.0f, 20}}) {
      test_sample<T>(c, logits(0.0), rule, sample);
    }
    test_sample<T>(c, logits(0.5), {1.0f, 3, 1.0f, 18}, sample);
    test_sample<T>(c, logits(0.5), {1.0f, 0, 0.3f, 19}, sample);
  }
  test_neighbours<T>(sample);
  test_nothing_beyond<T>(sample);
  test_no_distribution<T>();
}

}  // namespace
}  // namespace hybrid::testing

int main() {
  hybrid::testing::for_each_type([](auto kind) { hybrid::testing::test_type<decltype(kind)>(); });
  return hybrid::testing::finish_simt("sampling");
}
