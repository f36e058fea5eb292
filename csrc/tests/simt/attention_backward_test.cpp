// Gradients of attention over packed rows against their formulas, with what the forward kernel left: grouped heads, lengths around a
// tile, windows, ALiBi, head sizes that are no whole packs and that take several blocks.
#include "attention/flash_attention.cuh"
#include "attention/flash_backward.cuh"
#include "tests/simt/attention_cases.h"

namespace hybrid::testing {
namespace {

struct Gradients {
  std::vector<double> q, k, v;
};

// Autograd of softmax(q k scale + bias) v as torch writes it: every operation's result rounded, the heads of a group added up.
template <typename Mode, typename T>
Gradients differentiate(Batch<T>& in, const Buffer<T>& grad_out, const AttentionCase& c, float scale) {
  using Real = typename Mode::Real;
  const int64_t kv_size = in.rows * c.kv_heads * c.dim, group = c.heads / c.kv_heads;
  Gradients result{std::vector<double>(in.rows * c.heads * c.dim), std::vector<double>(kv_size), std::vector<double>(kv_size)};
  for (int64_t b = 0; b < in.lengths.size(); ++b) {
    const int64_t length = in.lengths[b], start = in.starts[b];
    for (int64_t head = 0; head < c.heads; ++head) {
      const int64_t kv_head = head / group;
      const auto query = [&](int64_t i, int64_t d) { return Real(to_float(in.q[((start + i) * c.heads + head) * c.dim + d])); };
      const auto key = [&](int64_t t, int64_t d) { return Real(to_float(*in.key(c, b, t, kv_head, d))); };
      const auto value = [&](int64_t t, int64_t d) { return Real(to_float(*in.value(c, b, t, kv_head, d))); };
      const auto grad = [&](int64_t i, int64_t d) { return Real(to_float(grad_out[((start + i) * c.heads + head) * c.dim + d])); };
      std::vector<Real> p(length * length), ds(length * length);
      for (int64_t i = 0; i < length; ++i) {
        const int64_t oldest = c.window > 0 ? std::max<int64_t>(0, i - c.window + 1) : 0;
        Real top = -std::numeric_limits<Real>::infinity(), mass = 0, delta = 0;
        for (int64_t t = oldest; t <= i; ++t) {
          Real sum = 0, dp = 0;
          for (int64_t d = 0; d < c.dim; ++d) {
            sum += query(i, d) * key(t, d);
            dp += grad(i, d) * value(t, d);
          }
          Real score = Mode::round(Mode::round(sum) * Real(scale));
          if (c.alibi) score = Mode::round(score + Mode::round(Real(in.slopes[head]) * Real(t - i)));
          p[i * length + t] = score;
          ds[i * length + t] = Mode::round(dp);
          top = std::max(top, score);
        }
        for (int64_t t = oldest; t <= i; ++t) mass += p[i * length + t] = std::exp(p[i * length + t] - top);
        for (int64_t t = oldest; t <= i; ++t) {
          p[i * length + t] = Mode::round(p[i * length + t] / mass);
          delta += p[i * length + t] * ds[i * length + t];
        }
        for (int64_t t = oldest; t <= i; ++t) {
          ds[i * length + t] = Mode::round(Mode::round(p[i * length + t] * (ds[i * length + t] - delta)) * Real(scale));
        }
      }
      for (int64_t i = 0; i < length; ++i) {
        for (int64_t d = 0; d < c.dim; ++d) {
          Real q = 0, k = 0, v = 0;
          for (int64_t t = 0; t < length; ++t) {
            q += ds[i * length + t] * key(t, d);
            k += ds[t * length + i] * query(t, d);
            v += p[t * length + i] * grad(t, d);
          }
          const int64_t at = ((start + i) * c.kv_heads + kv_head) * c.dim + d;
          result.q[((start + i) * c.heads + head) * c.dim + d] = Mode::round(q);
          result.k[at] = Mode::round(Real(result.k[at]) + Mode::round(k));
          result.v[at] = Mode::round(Real(result.v[at]) + Mode::round(v));
        }
      }
    }
  }
  return result;
}

template <typename T>
void test_backward(const AttentionCase& c, Accuracy& accuracy) {
  Batch<T> in(c);
  const Packed<T> packed(in, c);
  const float scale = 1.0f / std::sqrt(static_cast<float>(c.dim));
  const float* slopes = c.alibi ? in.slopes.data() : nullptr;
  const int64_t batch = in.lengths.size(), kv_size = in.rows * c.kv_heads * c.dim;
  Buffer<T> out(in.q.size(), c.shift), grad_out(in.q.size(), c.shift);
  Buffer<float> lse(c.heads * in.rows);
  Random random(3 * c.dim);
  random.fill(grad_out);
  cuda::flash_attention<T>({.q = packed.q(), .k = packed.k(c), .v = packed.v(c), .block_tables = nullptr, .kv_lengths = nullptr,
                            .cu_q = in.starts.data(), .alibi_slopes = slopes, .out = out.data(), .lse = lse.data(), .rows = in.rows,
                            .batch = batch, .heads = c.heads, .kv_heads = c.kv_heads, .head_dim = c.dim, .max_blocks = 0,
                            .q_stride = packed.stride, .k_stride = packed.stride, .v_stride = packed.stride, .window = c.window,
                            .scale = scale},
                           nullptr);
  const std::string what = std::string("attention_backward ") + kTypeName<T> + " " + c.name();
  const auto results = in_every_order(what, [&] {
    std::vector<Buffer<T>> grads;
    grads.emplace_back(in.q.size(), c.shift);
    grads.emplace_back(kv_size, c.shift);
    grads.emplace_back(kv_size, c.shift);
    Buffer<float> delta(lse.size());
    cuda::attention_backward<T>({.q = packed.q(), .k = packed.k(c), .v = packed.v(c), .out = out.data(), .grad_out = grad_out.data(),
                                 .lse = lse.data(), .delta = delta.data(), .grad_q = grads[0].data(), .grad_k = grads[1].data(),
                                 .grad_v = grads[2].data(), .cu_seqlens = in.starts.data(), .alibi_slopes = slopes,
                                 .tokens = in.rows, .batch = batch, .heads = c.heads, .kv_heads = c.kv_heads, .head_dim = c.dim,
                                 .q_stride = packed.stride, .kv_stride = packed.stride, .window = c.window, .scale = scale},
                                nullptr);
    return grads;
  });
  const Gradients exact = differentiate<Exact>(in, grad_out, c, scale), plain = differentiate<Plain<T>>(in, grad_out, c, scale);
  accuracy.check(results[0], exact.q, plain.q, what + " q");
  accuracy.check(results[1], exact.k, plain.k, what + " k");
  accuracy.check(results[2], exact.v, plain.v, what + " v");
}

template <typename T>
void test_type() {
  std::vector<AttentionCase> cases = {
      {1, 1, 8, {{3, 3}, {0, 0}, {65, 65}}},
      {3, 1, 72, {{66, 66}, {5, 5}}, 0, true},
      {2, 2, 20, {{67, 67}, {9, 9}}, 7, false, 1},
  };
  if (full_grid()) {
    const std::vector<AttentionCase> more = {
        {4, 2, 64, {{130, 130}, {64, 64}}},
        {2, 1, 136, {{70, 70}}, 65, true},
        {70, 1, 16, {{3, 3}, {66, 66}}},
        {2, 1, 32, {{200, 200}}, 130},
        {1, 1, 8, {}},
    };
    cases.insert(cases.end(), more.begin(), more.end());
  }
  Accuracy accuracy(std::string("attention_backward ") + kTypeName<T>);
  for (const AttentionCase& c : cases) test_backward<T>(c, accuracy);
}

}  // namespace
}  // namespace hybrid::testing

int main() {
  hybrid::testing::for_each_type([](auto kind) { hybrid::testing::test_type<decltype(kind)>(); });
  return hybrid::testing::finish_simt("attention_backward");
}
