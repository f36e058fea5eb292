// Attention over a paged cache and over packed rows, the rotary embedding and the append, against their formulas: grouped heads that
// fill a tile, part of it or several; lengths around a tile and a chunk; windows, ALiBi, several rows a sequence; head sizes that are
// no whole packs. What the cache holds beyond a sequence's end is NaN. The kernels for few rows and for many give the same bits.
#include "attention/flash_attention.cuh"
#include "attention/paged_attention.cuh"
#include "attention/rope.cuh"
#include "tests/simt/attention_cases.h"

namespace hybrid::testing {
namespace {

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
                            .q_stride = c.heads * c.dim,
                            .window = c.window,
                            .scale = scale},
                           nullptr);
  return out;
}

// The kernel for many rows on the same cache. It shares nothing between sequences.
template <typename T>
Buffer<T> run_flash(Batch<T>& in, const AttentionCase& c, float scale, Buffer<float>& lse) {
  Buffer<T> out(in.q.size(), c.shift);
  cuda::flash_attention<T>({.q = in.q.data(),
                            .k = in.cache.data(),
                            .v = in.cache.data(),
                            .block_tables = in.tables.data(),
                            .kv_lengths = in.lengths.data(),
                            .cu_q = in.starts.data(),
                            .alibi_slopes = c.alibi ? in.slopes.data() : nullptr,
                            .out = out.data(),
                            .lse = lse.data(),
                            .rows = in.rows,
                            .batch = in.lengths.size(),
                            .heads = c.heads,
                            .kv_heads = c.kv_heads,
                            .head_dim = c.dim,
                            .max_blocks = in.max_blocks,
                            .q_stride = c.heads * c.dim,
                            .k_stride = 0,
                            .v_stride = 0,
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
  Buffer<float> many_lse(lse.size());
  expect(run_flash(in, c, scale, many_lse).same_bits(results[0]), "few rows and many give the same bits");
  expect(many_lse.same_bits(lse), "and the same lse");
}

template <typename T>
Buffer<T> run_packed(Batch<T>& in, const Packed<T>& packed, const AttentionCase& c, float scale, Buffer<float>& lse) {
  Buffer<T> out(in.q.size(), c.shift);
  cuda::flash_attention<T>({.q = packed.q(),
                            .k = packed.k(c),
                            .v = packed.v(c),
                            .block_tables = nullptr,
                            .kv_lengths = nullptr,
                            .cu_q = in.starts.data(),
                            .alibi_slopes = c.alibi ? in.slopes.data() : nullptr,
                            .out = out.data(),
                            .lse = lse.data(),
                            .rows = in.rows,
                            .batch = in.lengths.size(),
                            .heads = c.heads,
                            .kv_heads = c.kv_heads,
                            .head_dim = c.dim,
                            .max_blocks = 0,
                            .q_stride = packed.stride,
                            .k_stride = packed.stride,
                            .v_stride = packed.stride,
                            .window = c.window,
                            .scale = scale},
                           nullptr);
  return out;
}

template <typename T>
void test_many_rows(const AttentionCase& c, Accuracy& accuracy) {
  Batch<T> in(c);
  const Packed<T> packed(in, c);
  const float scale = 1.0f / std::sqrt(static_cast<float>(c.dim));
  const std::string what = std::string("attention ") + kTypeName<T> + " " + c.name();
  Buffer<float> lse(c.heads * in.rows);
  const auto results = in_every_order(what, [&] {
    std::vector<Buffer<T>> out;
    lse.poison();
    out.push_back(run_packed(in, packed, c, scale, lse));
    return out;
  });
  const Attended exact = attend<Exact>(in, c, scale), plain = attend<Plain<T>>(in, c, scale);
  accuracy.check(results[0], exact.out, plain.out, what);
  accuracy.check(lse, exact.lse, plain.lse, what + " lse");
  Buffer<float> paged_lse(lse.size());
  expect(run_attention(in, c, scale, paged_lse).same_bits(results[0]), "prefill and decode give the same bits");
  expect(paged_lse.same_bits(lse), "and the same lse");
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

// Which sequence's block reads each chunk, and for how many, against a plain walk along the batch.
void test_readers(const AttentionCase& c, int most) {
  Batch<float> in(c);
  const auto batch = in.lengths.size(), chunks = cuda::attention_chunks(in.max_blocks);
  Buffer<int32_t> readers(batch * chunks);
  simt::run_grid(dim3(static_cast<unsigned>(batch), static_cast<unsigned>(chunks)), dim3(cuda::kWarpSize), 0, [&] {
    const cuda::SharedChunk chunk{in.tables.data(), in.lengths.data(), in.starts.data(), batch, in.max_blocks, c.window,
                                  blockIdx.y * cuda::kAttentionChunk};
    const int count = chunk.readers(blockIdx.x, most);
    if (threadIdx.x == 0) readers[blockIdx.x * chunks + blockIdx.y] = count;
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const auto sees_all = [&](int64_t b) {
      const int64_t length = c.sequences[b].length, first = chunk * cuda::kAttentionChunk;
      return c.sequences[b].rows == 1 && length >= first + cuda::kAttentionChunk && (c.window == 0 || length - c.window <= first);
    };
    const auto follows = [&](int64_t b) {
      return b > 0 && b < batch && sees_all(b - 1) && sees_all(b) && c.shared[b] >= (chunk + 1) * cuda::kChunkTiles;
    };
    for (int64_t b = 0; b < batch;) {
      int count = 1;
      while (count < most && follows(b + count)) ++count;
      for (int i = 0; i < count; ++i) {
        expect(readers[(b + i) * chunks + chunk] == (i == 0 ? count : 0), "one reading serves a run of sequences");
      }
      b += count;
    }
  }
}

void test_sharing() {
  AttentionCase samples{1, 1, 1, {}, 0, false, 0, {}};
  for (int i = 0; i < 75; ++i) {  // two prompts, of 40 and 35 samples: more than a warp has lanes
    samples.sequences.push_back({260 + i * 11 % 300, 1});
    samples.shared.push_back(i == 0 || i == 40 ? 0 : 4);
  }
  test_readers(samples, 16);
  test_readers(samples, 5);
  // All but a block of the chunk; a chunk and a part; two chunks; several rows; a key too few; a window that ends a key too late.
  const AttentionCase odd{1, 1, 1, {{256, 1}, {256, 1}, {400, 1}, {512, 1}, {600, 1}, {600, 3}, {600, 1}, {255, 1}, {700, 1}},
                          0, false, 0, {0, 3, 4, 6, 8, 8, 8, 4, 3}};
  test_readers(odd, 16);
  AttentionCase windowed = odd;
  windowed.window = 399;
  test_readers(windowed, 3);
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
                     dim, rotary, heads * dim},
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
    cuda::kv_append<T>({k.data(), v.data(), slots.data(), out[0].data(), rows, heads, dim, heads * dim, heads * dim}, nullptr);
    return out;
  });
  expect(results[0].same_bits(expected), "kv_append writes its slots and nothing else");
}

// A fused projection q|k|v: what rope and kv_append make of copies of its parts, rope_append and the two make of the parts where they
// lie.
template <typename T>
void test_rope_append(int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim, int64_t rotary, int64_t shift, Accuracy& accuracy) {
  constexpr int64_t kPositions = 9, kBlocks = 2;
  const int64_t parts[] = {heads * dim, kv_heads * dim, kv_heads * dim}, stride = parts[0] + 2 * parts[1] + (shift > 0 ? 5 : 0);
  Buffer<T> qkv(rows * stride, shift);
  Buffer<float> cos(kPositions * rotary / 2, shift), sin(kPositions * rotary / 2, shift);
  Buffer<int32_t> positions(rows);
  Buffer<int64_t> slots(rows);
  Random random(71);
  random.fill(qkv);
  random.fill(cos);
  random.fill(sin);
  for (int64_t i = 0; i < rows; ++i) {
    positions[i] = static_cast<int32_t>(random.bits() % kPositions);
    slots[i] = (i * 37 + 63) % (kBlocks * kKvTile);
  }
  const T *q = qkv.data(), *k = q + parts[0], *v = k + parts[1];
  const auto copy = [&](const T* part, int64_t width) {
    Buffer<T> dense(rows * width, shift);
    for (int64_t row = 0; row < rows; ++row) std::copy_n(part + row * stride, width, dense.data() + row * width);
    return dense;
  };
  const auto turned = [&](const T* in, int64_t in_stride, int64_t count) {
    Buffer<T> out(rows * count * dim, shift);
    cuda::rope<T>({in, out.data(), cos.data(), sin.data(), positions.data(), rows, count, dim, rotary, in_stride}, nullptr);
    return out;
  };
  const int64_t cache_size = kBlocks * kv_heads * 2 * kKvTile * dim;
  const auto results = in_every_order("rope_append", [&] {
    std::vector<Buffer<T>> out;
    out.emplace_back(rows * heads * dim, shift);
    out.emplace_back(cache_size, shift);
    cuda::rope_append<T>({.q = q, .k = k, .v = v, .out = out[0].data(), .cache = out[1].data(), .cos = cos.data(), .sin = sin.data(),
                          .positions = positions.data(), .slots = slots.data(), .rows = rows, .heads = heads, .kv_heads = kv_heads,
                          .head_dim = dim, .rotary = rotary, .q_stride = stride, .k_stride = stride, .v_stride = stride},
                         nullptr);
    return out;
  });
  const Buffer<T> queries = copy(q, parts[0]), keys = copy(k, parts[1]), values = copy(v, parts[2]);
  accuracy.check(results[0], rotate<Exact>(queries, cos, sin, positions, heads, dim, rotary),
                 rotate<Plain<T>>(queries, cos, sin, positions, heads, dim, rotary),
                 std::string("rope_append ") + kTypeName<T> + " " + GridCase{rows, dim, shift}.name());
  const Buffer<T> turned_keys = turned(keys.data(), parts[1], kv_heads);
  expect(results[0].same_bits(turned(queries.data(), parts[0], heads)), "rope_append turns queries as rope does");
  expect(results[0].same_bits(turned(q, stride, heads)), "rope reads them where they lie");
  Buffer<T> cache(cache_size, shift), apart(cache_size, shift);
  cuda::kv_append<T>({turned_keys.data(), values.data(), slots.data(), cache.data(), rows, kv_heads, dim, parts[1], parts[2]}, nullptr);
  expect(results[1].same_bits(cache), "rope_append writes turned keys and values to their slots and nothing else");
  cuda::kv_append<T>({turned_keys.data(), v, slots.data(), apart.data(), rows, kv_heads, dim, parts[1], stride}, nullptr);
  expect(apart.same_bits(cache), "kv_append reads them where they lie");
}

template <typename T>
void test_type() {
  std::vector<AttentionCase> cases = {
      {1, 1, 8, {{1, 1}, {63, 1}, {65, 2}, {2, 0}}},
      {6, 2, 72, {{64, 1}, {257, 1}}},
      {4, 1, 20, {{70, 5}, {3, 3}}, 0, true},
      {3, 1, 24, {{330, 2}}, 74},  // of the first chunk, the last key only
      {20, 1, 16, {{66, 2}, {1, 1}}, 0, true, 1},
      {16, 1, 64, {{20, 1}, {64, 1}}},  // the last block of the table is full, and half of the chunk is beyond it
      {6, 2, 24, {{300, 1}, {256, 1}, {270, 1}, {258, 1}, {260, 1}, {290, 1}, {257, 2}}, 0, true, 0, {0, 4, 4, 4, 4, 4, 4}},
  };
  if (full_grid()) {
    const std::vector<AttentionCase> more = {
        {8, 2, 128, {{129, 1}, {64, 2}, {1, 1}}, 0, true},
        {16, 1, 64, {{600, 1}, {20, 1}}},
        {2, 2, 96, {{513, 3}, {256, 1}, {255, 1}}, 256},
        {5, 1, 256, {{67, 4}}},
        {2, 1, 8, {{640, 1}, {520, 9}}, 65, true},
        {1, 1, 8, {}},
        {1, 1, 16, {{600, 1}, {300, 1}, {515, 1}, {530, 1}, {640, 1}}, 300, false, 0, {0, 4, 4, 8, 8}},
    };
    cases.insert(cases.end(), more.begin(), more.end());
    if (std::is_same_v<T, bf16>) cases.push_back({1, 1, 8, {{131072, 1}}, 300, true});  // places as far as they go
  }
  {
    Accuracy accuracy(std::string("paged_attention ") + kTypeName<T>);
    for (const AttentionCase& c : cases) test_attention<T>(c, accuracy);
  }
  std::vector<AttentionCase> packed = {
      {1, 1, 8, {{1, 1}, {0, 0}, {65, 65}}},
      {3, 1, 72, {{66, 66}, {5, 5}}, 0, true},
      {2, 2, 20, {{63, 63}, {9, 9}}, 7, false, 1},
      {2, 1, 64, {{66, 66}}},
      {1, 1, 17, {{5, 5}}},
  };
  if (full_grid()) {
    const std::vector<AttentionCase> more = {
        {4, 2, 64, {{330, 330}}},
        {1, 1, 136, {{70, 70}, {64, 64}}, 65, true},
        {70, 1, 16, {{3, 3}, {66, 66}}},
        {2, 1, 32, {{540, 540}}, 130},
        {1, 1, 8, {}},
    };
    packed.insert(packed.end(), more.begin(), more.end());
  }
  {
    Accuracy accuracy(std::string("attention ") + kTypeName<T>);
    for (const AttentionCase& c : packed) test_many_rows<T>(c, accuracy);
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
  const int64_t appends[][4] = {{5, 2, 64, 0}, {7, 3, 20, 0}, {3, 40, 72, 1}, {0, 1, 8, 0}};
  for (const auto& [rows, heads, dim, shift] : appends) test_append<T>(rows, heads, dim, shift);
  report_exact(std::string("kv_append ") + kTypeName<T>, static_cast<int>(std::size(appends)));
  Accuracy accuracy(std::string("rope_append ") + kTypeName<T>);
  test_rope_append<T>(5, 3, 1, 64, 64, 0, accuracy);
  test_rope_append<T>(3, 4, 2, 64, 32, 0, accuracy);
  test_rope_append<T>(4, 2, 2, 20, 12, 0, accuracy);
  test_rope_append<T>(7, 6, 2, 24, 10, 1, accuracy);
  test_rope_append<T>(2, 1, 1, 8, 0, 0, accuracy);
  test_rope_append<T>(0, 1, 1, 8, 8, 0, accuracy);
}

}  // namespace
}  // namespace hybrid::testing

int main() {
  hybrid::testing::test_sharing();
  hybrid::testing::for_each_type([](auto kind) { hybrid::testing::test_type<decltype(kind)>(); });
  return hybrid::testing::finish_simt("attention");
}
