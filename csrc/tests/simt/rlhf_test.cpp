// rlhf.cuh against the formulas of rlhf.h in order, one token after another: ragged lengths, empty masks, several chunks, ratios and
// values on both sides of every clip.
#include "rlhf/rlhf.cuh"

#include "tests/simt/harness.h"

namespace hybrid::testing {
namespace {

std::vector<double> as_floats(const std::vector<double>& exact) {
  std::vector<double> out;
  for (const double x : exact) out.push_back(static_cast<float>(x));
  return out;
}

Buffer<bool> random_mask(int64_t count, double kept, uint64_t seed) {
  Buffer<bool> mask(count);
  Random random(seed);
  for (int64_t i = 0; i < count; ++i) mask[i] = random.uniform() < kept;
  return mask;
}

// Double sums in another order: a few units in the last place of the sum of magnitudes.
void expect_sum(double actual, double expected, double magnitudes, const std::string& what) {
  if (std::abs(actual - expected) <= 1e-13 * magnitudes) return;
  std::fprintf(stderr, "%s: %.17g, expected %.17g\n", what.c_str(), actual, expected);
  expect(false, "sum");
}

void test_gae(int64_t batch, int64_t steps, double gamma, double lam, Accuracy& accuracy) {
  Buffer<float> rewards(batch * steps), values(batch * steps);
  Buffer<int64_t> lengths(batch);
  Random random(29);
  random.fill(rewards);
  random.fill(values);
  for (int64_t b = 0; b < batch; ++b) {
    lengths[b] = b == 0 ? steps : static_cast<int64_t>(random.uniform() * static_cast<double>(steps + 1));
  }
  const std::string what = "gae " + GridCase{batch, steps}.name();
  const auto results = in_every_order(what, [&] {
    std::vector<Buffer<float>> out;
    for (int i = 0; i < 2; ++i) out.emplace_back(batch * steps);
    cuda::gae({rewards.data(), values.data(), lengths.data(), out[0].data(), out[1].data(), batch, steps, gamma, lam},
              nullptr);
    return out;
  });
  std::vector<double> advantages(batch * steps), returns(batch * steps);
  for (int64_t b = 0; b < batch; ++b) {
    double advantage = 0.0, next_value = 0.0;
    for (int64_t t = lengths[b] - 1; t >= 0; --t) {
      const int64_t i = b * steps + t;
      advantage = rewards[i] + gamma * next_value - values[i] + gamma * lam * advantage;
      next_value = values[i];
      advantages[i] = advantage;
      returns[i] = advantage + values[i];
    }
  }
  accuracy.check(results[0], advantages, as_floats(advantages), what + " advantages");
  accuracy.check(results[1], returns, as_floats(returns), what + " returns");
}

void test_whitening(int64_t count, double kept, bool shift_mean, Accuracy& accuracy) {
  Buffer<float> x(count);
  Random(31).fill(x, 2.0, 100.0);
  const Buffer<bool> mask = random_mask(count, kept, 37);
  const std::string what = "whiten " + std::to_string(count) + " kept " + std::to_string(kept);
  Buffer<double> moments(3), partial(2 * cuda::rlhf_chunks(count));
  const auto results = in_every_order(what, [&] {
    std::vector<Buffer<float>> out;
    out.emplace_back(count);
    moments.poison();
    partial.poison();
    cuda::masked_moments(x.data(), mask.data(), count, moments.data(), partial.data(), nullptr);
    cuda::masked_whiten(x.data(), mask.data(), moments.data(), shift_mean, out[0].data(), count, nullptr);
    return out;
  });
  double number = 0.0, sum = 0.0, squares = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    number += mask[i];
    sum += mask[i] ? x[i] : 0.0;
  }
  const double mean = number > 0.0 ? sum / number : 0.0;
  for (int64_t i = 0; i < count; ++i) squares += mask[i] ? (x[i] - mean) * (x[i] - mean) : 0.0;
  expect(moments[0] == number, "count");
  expect_sum(moments[1], mean, std::abs(mean), what + " mean");
  expect_sum(moments[2], squares, squares + 1.0, what + " squares");
  std::vector<double> white;
  const double scale = 1.0 / std::sqrt(squares / std::max(number - 1.0, 1.0) + 1e-8);
  for (int64_t i = 0; i < count; ++i) {
    white.push_back(mask[i] ? (x[i] - mean) * scale + (shift_mean ? 0.0 : mean) : 0.0);
  }
  accuracy.check(results[0], white, as_floats(white), what);
}

// `wild`: some ratios are so large that one of them outweighs all others.
void test_policy_loss(int64_t count, double dual_clip, bool wild, Accuracy& accuracy) {
  Buffer<float> logprob(count), old_logprob(count), advantages(count);
  Random random(41);
  random.fill(old_logprob, 1.0, -3.0);
  random.fill(advantages);
  for (int64_t i = 0; i < count; ++i) {
    const double step = !wild ? 0.15 : i % 17 == 0 ? 30.0 : i % 5 == 0 ? 2.0 : 0.15;
    logprob[i] = old_logprob[i] + static_cast<float>(step * random.normal());
  }
  const Buffer<bool> mask = random_mask(count, 0.8, 43);
  const double low = 0.2, high = 0.3;
  Buffer<double> loss(1), stats(cuda::kPolicyStats), partial(cuda::rlhf_chunks(count) * (1 + cuda::kPolicyStats));
  const auto results = in_every_order("ppo_policy_loss", [&] {
    std::vector<Buffer<float>> out;
    out.emplace_back(count);
    for (Buffer<double>* buffer : {&loss, &stats, &partial}) buffer->poison();
    cuda::ppo_policy_loss({logprob.data(), old_logprob.data(), advantages.data(), mask.data(), out[0].data(), count,
                           low, high, dual_clip},
                          loss.data(), stats.data(), partial.data(), nullptr);
    return out;
  });
  std::vector<double> grad(count);
  double sums[8] = {}, magnitudes[8] = {};
  for (int64_t i = 0; i < count; ++i) {
    if (!mask[i]) continue;
    const double difference = double(logprob[i]) - old_logprob[i], d = std::clamp(difference, -20.0, 20.0);
    const double r = std::exp(d), a = advantages[i];
    const double plain = -a * r, bounded = -a * std::clamp(r, 1.0 - low, 1.0 + high);
    double token = std::max(plain, bounded);
    grad[i] = bounded > plain || difference != d ? 0.0 : plain;
    if (dual_clip > 0.0 && a < 0.0 && token > -a * dual_clip) {
      token = -a * dual_clip;
      grad[i] = 0.0;
    }
    const double terms[8] = {token, 1.0, double(bounded > plain && r < 1.0), double(bounded > plain && r > 1.0),
                             0.5 * d * d, std::expm1(d) - d, r, r};
    for (int k = 0; k < 8; ++k) {
      sums[k] = k == 7 ? std::max(sums[k], terms[k]) : sums[k] + terms[k];
      magnitudes[k] += std::abs(terms[k]);
    }
  }
  accuracy.check(results[0], grad, as_floats(grad), "ppo_policy_loss grad");
  expect_sum(loss[0], sums[0], magnitudes[0], "ppo_policy_loss");
  for (int k = 1; k < 8; ++k) {
    expect_sum(stats[k - 1], sums[k], magnitudes[k], "ppo_policy_loss statistic " + std::to_string(k - 1));
  }
}

void test_value_loss(int64_t count, double clip, Accuracy& accuracy) {
  Buffer<float> values(count), old_values(count), returns(count);
  Random random(47);
  random.fill(values);
  random.fill(old_values);
  random.fill(returns, 1.0, 0.5);
  const Buffer<bool> mask = random_mask(count, 0.7, 53);
  Buffer<double> loss(1), stats(cuda::kValueStats), partial(cuda::rlhf_chunks(count) * (1 + cuda::kValueStats));
  const auto results = in_every_order("ppo_value_loss", [&] {
    std::vector<Buffer<float>> out;
    out.emplace_back(count);
    for (Buffer<double>* buffer : {&loss, &stats, &partial}) buffer->poison();
    cuda::ppo_value_loss({values.data(), old_values.data(), returns.data(), mask.data(), out[0].data(), count, clip},
                         loss.data(), stats.data(), partial.data(), nullptr);
    return out;
  });
  std::vector<double> grad(count);
  double sums[7] = {}, magnitudes[7] = {};
  for (int64_t i = 0; i < count; ++i) {
    if (!mask[i]) continue;
    const double v = values[i], target = returns[i], error = target - v;
    const double bounded = std::clamp(v, old_values[i] - clip, old_values[i] + clip);
    const double plain = error * error, cut = (bounded - target) * (bounded - target);
    grad[i] = cut > plain ? 0.0 : v - target;
    const double terms[7] = {0.5 * std::max(plain, cut), 1.0, double(cut > plain), error, error * error, target,
                             target * target};
    for (int k = 0; k < 7; ++k) {
      sums[k] += terms[k];
      magnitudes[k] += std::abs(terms[k]);
    }
  }
  accuracy.check(results[0], grad, as_floats(grad), "ppo_value_loss grad");
  expect_sum(loss[0], sums[0], magnitudes[0], "ppo_value_loss");
  for (int k = 1; k < 7; ++k) {
    expect_sum(stats[k - 1], sums[k], magnitudes[k], "ppo_value_loss statistic " + std::to_string(k - 1));
  }
}

}  // namespace
}  // namespace hybrid::testing

int main() {
  using namespace hybrid::testing;
  {
    Accuracy accuracy("gae");
    const std::pair<int64_t, int64_t> shapes[] = {{1, 1}, {3, 31}, {5, 32}, {4, 33}, {2, 200}, {0, 5}, {3, 0}};
    for (const auto& [batch, steps] : shapes) {
      test_gae(batch, steps, 1.0, 0.95, accuracy);
      test_gae(batch, steps, 0.99, 0.0, accuracy);
    }
  }
  {
    Accuracy accuracy("masked_whiten");
    for (const int64_t count : {1, 255, 256, 257, 4096, 4097, 9000, 0}) {
      test_whitening(count, 0.6, true, accuracy);
    }
    test_whitening(300, 0.6, false, accuracy);
    test_whitening(300, 0.0, true, accuracy);
  }
  {
    Accuracy policy("ppo_policy_loss"), value("ppo_value_loss");
    for (const int64_t count : {1, 300, 4096, 4097, 9000, 0}) {
      test_policy_loss(count, 0.0, true, policy);
      test_policy_loss(count, 3.0, true, policy);
      test_value_loss(count, 0.2, value);
      test_value_loss(count, INFINITY, value);
    }
    test_policy_loss(300, 0.0, false, policy);
  }
  return finish_simt("rlhf");
}
