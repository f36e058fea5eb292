// Parameters out of shards, byte for byte as the host's unshard() does it: parts that divide nothing, addresses of every remainder
// by 16, parameters of nothing and of several blocks, more parameters than a launch takes. What lies between parameters stays.
#include "gather/unshard.cuh"
#include "tests/simt/harness.h"

namespace hybrid::testing {
namespace {

struct Parameter {
  int64_t part, size, gap;  // bytes of a rank's part, of what is kept, and left alone before it in the destination
  int64_t start = 0;        // of what is kept
};

// What UnshardArgs says, byte by byte.
void unshard_bytes(const UnshardArgs& args) {
  for (int64_t r = 0; r < args.runs; ++r) {
    for (int64_t i = 0; i < args.sizes[r]; ++i) {
      const int64_t at = args.starts[r] + i, part = args.parts[r];
      args.out[args.offsets[r] + i] = args.shards[at / part * args.shard + args.columns[r] + at % part];
    }
  }
}

int results = 0;

void test_unshard(int64_t ranks, const std::vector<Parameter>& parameters, int64_t shift) {
  std::vector<int64_t> columns, parts, starts, sizes, offsets;
  int64_t shard = 0, end = 0;
  for (const Parameter& p : parameters) {
    columns.push_back(shard);
    parts.push_back(p.part);
    starts.push_back(p.start);
    sizes.push_back(p.size);
    offsets.push_back(end + p.gap);
    shard += p.part;
    end = offsets.back() + p.size;
  }
  Buffer<uint8_t> shards(ranks * shard, shift), expected(end + 3, shift);
  Random random(101 + shard);
  for (int64_t i = 0; i < shards.size(); ++i) shards[i] = static_cast<uint8_t>(random.bits());
  const auto args = [&](Buffer<uint8_t>& out) {
    return UnshardArgs{reinterpret_cast<const std::byte*>(shards.data()), ranks, shard, columns.data(), parts.data(),
                       starts.data(), sizes.data(), offsets.data(), std::ssize(parameters), reinterpret_cast<std::byte*>(out.data())};
  };
  unshard_bytes(args(expected));
  const auto out = in_every_order("unshard", [&] {
    std::vector<Buffer<uint8_t>> filled;
    filled.emplace_back(expected.size(), shift);
    cuda::unshard(args(filled[0]), nullptr);
    return filled;
  });
  ++results;
  expect(out[0].same_bits(expected), "unshard_ writes the parameters and nothing else");
}

void test_all() {
  constexpr int64_t kBlock = cuda::kUnshardBlockBytes;
  for (int64_t shift = 0; shift < 16; shift += full_grid() ? 1 : 5) {
    test_unshard(2, {{16, 32, 0}, {48, 96, 0}}, shift);
    test_unshard(3, {{24, 70, 1}, {2, 5, 3}, {0, 0, 0}, {7, 21, 2}, {130, 259, 0}}, shift);
    test_unshard(3, {{24, 40, 1, 17}, {2, 1, 3, 5}, {7, 14, 0, 7}, {130, 259, 0, 130}}, shift);
    test_unshard(4, {{18, 72, 2}, {36, 140, 4}, {64, 256, 8}}, shift);
  }
  test_unshard(2, {{kBlock / 2, kBlock, 0}}, 0);
  test_unshard(1, {{kBlock + 17, kBlock + 17, 0}, {5, 5, 0}}, 0);
  test_unshard(3, {{kBlock - 40, 3 * kBlock - 129, 7}, {34, 100, 0}}, 2);
  test_unshard(3, {{kBlock - 40, kBlock + 5, 7, kBlock - 9}, {34, 70, 0, 32}}, 2);
  test_unshard(8, {{1, 8, 0}, {3, 17, 0}}, 0);
  test_unshard(2, {}, 0);
  test_unshard(2, {{0, 0, 0}, {4, 0, 0}}, 0);
  for (const int64_t count : {cuda::kUnshardTable - 1, cuda::kUnshardTable, cuda::kUnshardTable + 1}) {
    std::vector<Parameter> many;
    for (int64_t i = 0; i < count; ++i) many.push_back({10 + i % 9, 2 * (10 + i % 9) - i % 2, i % 3});
    test_unshard(2, many, 4);
  }
}

}  // namespace
}  // namespace hybrid::testing

int main() {
  hybrid::testing::test_all();
  hybrid::testing::report_exact("unshard_", hybrid::testing::results);
  return hybrid::testing::finish_simt("gather");
}
