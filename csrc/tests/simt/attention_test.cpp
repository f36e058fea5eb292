// Attention over a paged cache, the rotary embedding and the append, against their formulas: grouped heads that fill a tile, part of
// it or several; lengths around a tile and a chunk; windows, ALiBi, several rows a sequence; head sizes that are no whole packs.
// What the cache holds beyond a sequence's end is NaN.
#include <numeric>

#include "attention/paged_attention.cuh"
#include "attention/rope.cuh"
#include "tests/simt/harness.h"

namespace hybrid::testing {
namespace {

struct Sequence {
  int64_t length, rows;  // keys, and queries at the last places
};

struct AttentionCase {
  int64_t heads, kv_heads, dim;
  std::vector<Sequence> sequences;
  int64_t window = 0;
  bool alibi = false;
  int64_t shift = 0;

  std::string name() const {
    std::string text = "heads " + std::to_string(heads) + "/" + std::to_string(kv_heads) + " dim " + std::to_string(dim) +
                       " window " + std::to_string(window) + (alibi ? " alibi" : "") + " lengths";
    for (const Sequence& s : sequences) text += " " + std::to_string(s.length) + ":" + std::to_string(s.rows);
    return text;
  }
};

// A batch whose keys and values lie in shuffled blocks.
template <typename T>
struct Batch {
  int64_t rows = 0, max_blocks = 1, blocks = 1;
  Buffer<int32_t> tables, lengths, starts;
  Buffer<T> q, cache;
  Buffer<float> slopes;

  explicit Batch(const AttentionCase& c)
      : tables(count(c)), lengths(std::ssize(c.sequences)), starts(std::ssize(c.sequences) + 1),
        q(rows * c.heads * c.dim, c.shift), cache(blocks * c.kv_heads * 2 * kKvTile * c.dim, c.shift), slopes(c.heads) {
    Random random(7 * c.dim + c.heads);
    random.fill(q);
    for (int64_t h = 0; h < c.heads; ++h) slopes[h] = 0.1f / static_cast<float>(h + 1);
    std::vector<int32_t> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    for (int64_t i = blocks - 1; i > 0; --i) std::swap(order[i], order[random.bits() % (i + 1)]);
    starts[0] = 0;
    int64_t used = 0;
    for (int64_t b = 0; b < lengths.size(); ++b) {
      const Sequence& s = c.sequences[b];
      lengths[b] = static_cast<int32_t>(s.length);
      starts[b + 1] = static_cast<int32_t>(starts[b] + s.rows);
      for (int64_t block = 0; block * kKvTile < s.length; ++block) tables[b * max_blocks + block] = order[used++];
      for (int64_t t = 0; t < s.length; ++t) {
        for (int64_t h = 0; h < c.kv_heads; ++h) {
          for (int64_t d = 0; d < c.dim; ++d) {
            *key(c, b, t, h, d) = round_to<T>(static_cast<float>(random.normal()));
            *value(c, b, t, h, d) = round_to<T>(static_cast<float>(random.normal()));
          }
        }
      }
    }
  }

  T* key(const AttentionCase& c, int64_t b, int64_t t, int64_t h, int64_t d) {
    const int64_t block = tables[b * max_blocks + t / kKvTile];
    return &cache[((block * c.kv_heads + h) * 2 * kKvTile + t % kKvTile) * c.dim + d];
  }
  T* value(const AttentionCase& c, int64_t b, int64_t t, int64_t h, int64_t d) {
    return key(c, b, t, h, d) + kKvTile * c.dim;
  }

 private:
  int64_t count(const AttentionCase& c) {
    for (const Sequence& s : c.sequences) {
      rows += s.rows;
      max_blocks = std::max(max_blocks, (s.length + kKvTile - 1) / kKvTile);
      blocks += (s.length + kKvTile - 1) / kKvTile;
    }
    return std::ssize(c.sequences) * max_blocks;
  }
};

struct Attended {
  std::vector<double> out, lse;
};

// softmax(q k scale + bias) v as torch writes it: every operation's result rounded.
template <typename Mode, typename T>
Attended attend(Batch<T>& in, const AttentionCase& c, float scale) {
  using Real = typename Mode::Real;
  Attended result{std::vector<double>(in.rows * c.heads * c.dim), std::vector<double>(c.heads * in.rows)};
  for (int64_t b = 0; b < in.lengths.size(); ++b) {
    const Sequence& s = c.sequences[b];
    for (int64_t i = 0; i < s.rows * c.heads; ++i) {
      const int64_t row = in.starts[b] + i / c.heads, head = i % c.heads, kv_head = head / (c.heads / c.kv_heads);
      const int64_t position = s.length - s.rows + i / c.heads;
      const int64_t oldest = c.window > 0 ? std::max<int64_t>(0, position - c.window + 1) : 0;
      std::vector<Real> weights;
      for (int64_t t = oldest; t <= position; ++t) {
        Real sum = 0;
        for (int64_t d = 0; d < c.dim; ++d) {
          sum += Real(to_float(in.q[(row * c.heads + head) * c.dim + d])) * Real(to_float(*in.key(c, b, t, kv_head, d)));
        }
        Real score = Mode::round(Mode::round(sum) * Real(scale));
        if (c.alibi) score = Mode::round(score + Mode::round(Real(in.slopes[head]) * Real(t - position)));
        weights.push_back(score);
      }
      const Real top = *std::max_element(weights.begin(), weights.end());
      Real mass = 0;
      for (Real& w : weights) mass += w = std::exp(w - top);
      for (Real& w : weights) w = Mode::round(w / mass);
      for (int64_t d = 0; d < c.dim; ++d) {
        Real sum = 0;
        for (int64_t t = oldest; t <= position; ++t) sum += weights[t - oldest] * Real(to_float(*in.value(c, b, t, kv_head, d)));
        result.out[(row * c.heads + head) * c.dim + d] = Mode::round(sum);
      }
      result.lse[head * in.rows + row] = top + std::log(mass);
    }
  }
  return result;
}

template <typename T>
Buffer<T> run_attention(Batch<T>& in, const AttentionCase& c, float scale, Buffer<float>& lse) {
  Buffer<T> out(in.q.size(), c.shift);
  Buffer<float> partial(in.rows * c.heads * cuda::attention_chunks(in.max_blocks) * (c.dim + 2));
  cuda::paged_attention<T>({.q = in.q.data(),
                            .cache = in.cache.data(),
                            .block_tables = in.tables.data(),
                            .kv_lengths = in.lengths.data(),
                            .cu_q = in.starts.data(),
                            .alibi_slopes = c.alibi ? in.slopes.data() : nullptr,
                            .out = out.data(),
                            .lse = lse.data(),
                            .partial = partial.data(),
                            .rows = in.rows,
                            .batch = in.lengths.size(),
                            .heads = c.heads,
                            .kv_heads = c.kv_heads,
                            .head_dim = c.dim,
                            .max_blocks = in.max_blocks,
                            .window = c.window,
                            .scale = scale},
                           nullptr);
  return out;
}

template <typename T>
void test_attention(const AttentionCase& c, Accuracy& accuracy) {
  Batch<T> in(c);
  const float scale = 1.0f / std::sqrt(static_cast<float>(c.dim));
  const std::string what = std::string("paged_attention ") + kTypeName<T> + " " + c.name();
  Buffer<float> lse(c.heads * in.rows);
  const auto results = in_every_order(what, [&] {
    std::vector<Buffer<T>> out;
    lse.poison();
    out.push_back(run_attention(in, c, scale, lse));
    return out;
  });
  const Attended exact = attend<Exact>(in, c, scale), plain = attend<Plain<T>>(in, c, scale);
  accuracy.check(results[0], exact.out, plain.out, what);
  accuracy.check(lse, exact.lse, plain.lse, what + " lse");
}

// A row's bits belong to its sequence and place: they do not change with the other sequences of the batch, the other rows of the
// sequence, or the place of its blocks.
template <typename T>
void test_own_bits() {
  const AttentionCase together{6, 2, 24, {{70, 3}, {300, 1}, {5, 5}}};
  Batch<T> in(together);
  Buffer<float> lse(together.heads * in.rows);
  const Buffer<T> all = run_attention(in, together, 0.2f, lse);
  for (int64_t b = 0; b < 3; ++b) {
    for (int64_t i = 0; i < together.sequences[b].rows; ++i) {
      const int64_t length = together.sequences[b].length - together.sequences[b].rows + i + 1;
      AttentionCase alone = together;
      alone.sequences = {{length, 1}};
      Batch<T> single(alone);
      const int64_t row = in.starts[b] + i, width = together.heads * together.dim;
      std::copy_n(in.q.data() + row * width, width, single.q.data());
      for (int64_t j = 0; j < 2 * length * together.dim; ++j) {
        const int64_t h = j % 2, t = j / 2 % length, d = j / 2 / length;
        *single.key(alone, 0, t, h, d) = *in.key(together, b, t, h, d);
        *single.value(alone, 0, t, h, d) = *in.value(together, b, t, h, d);
      }
      Buffer<float> single_lse(together.heads);
      const Buffer<T> one = run_attention(single, alone, 0.2f, single_lse);
      expect(std::memcmp(one.data(), all.data() + row * width, width * sizeof(T)) == 0, "a row's bits are its own");
      for (int64_t h = 0; h < together.heads; ++h) expect(single_lse[h] == lse[h * in.rows + row], "and its lse");
    }
  }
}

template <typename Mode, typename T>
std::vector<double> rotate(const Buffer<T>& in, const Buffer<float>& cos, const Buffer<float>& sin,
                           const Buffer<int32_t>& positions, int64_t heads, int64_t dim, int64_t rotary) {
  using Real = typename Mode::Real;
  std::vector<double> out;
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < in.size(); ++i) {
    const int64_t col = i % dim, row = i / dim / heads, angle = positions[row] * half + (col < half ? col : col - half);
    const Real x = to_float(in[i]);
    if (col >= rotary) {
      out.push_back(x);
      continue;
    }
    const Real partner = col < half ? -Real(to_float(in[i + half])) : Real(to_float(in[i - half]));
    out.push_back(Mode::round(Mode::round(x * Real(cos[angle])) + Mode::round(partner * Real(sin[angle]))));
  }
  return out;
}

template <typename T>
void test_rope(int64_t rows, int64_t heads, int64_t dim, int64_t rotary, int64_t shift, Accuracy& accuracy) {
  constexpr int64_t kPositions = 11;
  Buffer<T> in(rows * heads * dim, shift);
  Buffer<float> cos(kPositions * rotary / 2, shift), sin(kPositions * rotary / 2, shift);
  Buffer<int32_t> positions(rows);
  Random random(61);
  random.fill(in);
  random.fill(cos);
  random.fill(sin);
  for (int64_t i = 0; i < rows; ++i) positions[i] = static_cast<int32_t>(random.bits() % kPositions);
  const std::string what = std::string("rope ") + kTypeName<T> + " " + GridCase{rows, dim, shift}.name();
  const auto results = in_every_order(what, [&] {
    std::vector<Buffer<T>> out;
    for (int i = 0; i < 2; ++i) out.emplace_back(in.size(), shift);
    std::copy_n(in.data(), in.size(), out[1].data());
    for (int i = 0; i < 2; ++i) {  // into other storage, and in place
      cuda::rope<T>({i == 0 ? in.data() : out[1].data(), out[i].data(), cos.data(), sin.data(), positions.data(), rows, heads,
                     dim, rotary},
                    nullptr);
    }
    return out;
  });
  expect(results[0].same_bits(results[1]), "rope in place");
  accuracy.check(results[0], rotate<Exact>(in, cos, sin, positions, heads, dim, rotary),
                 rotate<Plain<T>>(in, cos, sin, positions, heads, dim, rotary), what);
}

template <typename T>
void test_append(int64_t rows, int64_t heads, int64_t dim, int64_t shift) {
  constexpr int64_t kBlocks = 3;
  Buffer<T> k(rows * heads * dim, shift), v(rows * heads * dim, shift);
  Buffer<T> cache(kBlocks * heads * 2 * kKvTile * dim, shift), expected(cache.size(), shift);
  Buffer<int64_t> slots(rows);
  Random random(67);
  random.fill(k);
  random.fill(v);
  for (int64_t row = 0; row < rows; ++row) {
    slots[row] = (row * 37 + 63) % (kBlocks * kKvTile);
    for (int64_t i = 0; i < heads * dim; ++i) {
      const int64_t at = ((slots[row] / kKvTile * heads + i / dim) * 2 * kKvTile + slots[row] % kKvTile) * dim + i % dim;
      expected[at] = k[row * heads * dim + i];
      expected[at + kKvTile * dim] = v[row * heads * dim + i];
    }
  }
  const auto results = in_every_order("kv_append", [&] {
    std::vector<Buffer<T>> out;
    out.emplace_back(cache.size(), shift);
    cuda::kv_append<T>({k.data(), v.data(), slots.data(), out[0].data(), rows, heads, dim}, nullptr);
    return out;
  });
  expect(results[0].same_bits(expected), "kv_append writes its slots and nothing else");
}

template <typename T>
void test_type() {
  std::vector<AttentionCase> cases = {
      {1, 1, 8, {{1, 1}, {63, 1}, {65, 2}, {2, 0}}},
      {6, 2, 72, {{64, 1}, {257, 1}}},
      {4, 1, 20, {{70, 5}, {3, 3}}, 0, true},
      {3, 1, 24, {{330, 2}}, 70},
      {20, 1, 16, {{66, 2}, {1, 1}}, 0, true, 1},
  };
  if (full_grid()) {
    const std::vector<AttentionCase> more = {
        {8, 2, 128, {{129, 1}, {64, 2}, {1, 1}}, 0, true},
        {16, 1, 64, {{600, 1}, {20, 1}}},
        {2, 2, 96, {{513, 3}, {256, 1}, {255, 1}}, 256},
        {5, 1, 256, {{67, 4}}},
        {2, 1, 8, {{640, 1}, {520, 9}}, 65, true},
        {1, 1, 8, {}},
    };
    cases.insert(cases.end(), more.begin(), more.end());
  }
  {
    Accuracy accuracy(std::string("paged_attention ") + kTypeName<T>);
    for (const AttentionCase& c : cases) test_attention<T>(c, accuracy);
  }
  test_own_bits<T>();
  {
    Accuracy accuracy(std::string("rope ") + kTypeName<T>);
    test_rope<T>(5, 3, 64, 64, 0, accuracy);
    test_rope<T>(33, 2, 64, 32, 0, accuracy);
    test_rope<T>(4, 3, 20, 12, 0, accuracy);
    test_rope<T>(4, 1, 24, 10, 1, accuracy);
    test_rope<T>(2, 1, 8, 0, 0, accuracy);
    test_rope<T>(0, 1, 8, 8, 0, accuracy);
  }
  test_append<T>(5, 2, 64, 0);
  test_append<T>(7, 3, 20, 0);
  test_append<T>(3, 40, 72, 1);
  test_append<T>(0, 1, 8, 0);
}

}  // namespace
}  // namespace hybrid::testing

int main() {
  hybrid::testing::for_each_type([](auto kind) { hybrid::testing::test_type<decltype(kind)>(); });
  return hybrid::testing::finish_simt("attention");
}
