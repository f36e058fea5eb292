// What the attention tests share: batches of sequences, in a paged cache and packed, and attention by its formula.
#pragma once
#include <numeric>

#include "attention/attention.h"
#include "tests/simt/harness.h"

namespace hybrid::testing {

struct Sequence {
  int64_t length, rows;  // keys, and queries at the last places
};

struct AttentionCase {
  int64_t heads, kv_heads, dim;
  std::vector<Sequence> sequences;
  int64_t window = 0;
  bool alibi = false;
  int64_t shift = 0;
  std::vector<int64_t> shared = {};  // blocks that each sequence has in common with the one before it

  std::string name() const {
    std::string text = "heads " + std::to_string(heads) + "/" + std::to_string(kv_heads) + " dim " + std::to_string(dim) +
                       " window " + std::to_string(window) + (alibi ? " alibi" : "") + " lengths";
    for (const Sequence& s : sequences) text += " " + std::to_string(s.length) + ":" + std::to_string(s.rows);
    for (size_t b = 0; b < shared.size(); ++b) text += (b == 0 ? " shared " : " ") + std::to_string(shared[b]);
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
      for (int64_t block = 0; block * kKvTile < s.length; ++block) {
        const bool common = b > 0 && !c.shared.empty() && block < c.shared[b];
        tables[b * max_blocks + block] = common ? tables[(b - 1) * max_blocks + block] : order[used++];
      }
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

// Sequences whose rows are all their positions, packed: q, k and v lie in rows of one array, as a fused projection leaves them.
template <typename T>
struct Packed {
  int64_t stride;
  Buffer<T> qkv;

  Packed(Batch<T>& in, const AttentionCase& c)
      : stride((c.heads + 2 * c.kv_heads) * c.dim + (c.shift > 0 ? 3 : 0)), qkv(in.rows * stride, c.shift) {
    for (int64_t b = 0; b < in.lengths.size(); ++b) {
      for (int64_t t = 0; t < in.lengths[b]; ++t) {
        T* row = qkv.data() + (in.starts[b] + t) * stride;
        std::copy_n(in.q.data() + (in.starts[b] + t) * c.heads * c.dim, c.heads * c.dim, row);
        for (int64_t i = 0; i < c.kv_heads * c.dim; ++i) {
          row[c.heads * c.dim + i] = *in.key(c, b, t, i / c.dim, i % c.dim);
          row[(c.heads + c.kv_heads) * c.dim + i] = *in.value(c, b, t, i / c.dim, i % c.dim);
        }
      }
    }
  }
  const T* q() const { return qkv.data(); }
  const T* k(const AttentionCase& c) const { return q() + c.heads * c.dim; }
  const T* v(const AttentionCase& c) const { return k(c) + c.kv_heads * c.dim; }
};

}  // namespace hybrid::testing
