// Parameters, or runs of their bytes, out of the shards of all ranks.
//
// A block owns 16 KiB of one run's destination, a thread 16 bytes of every 4 KiB of it. The destination's multiples of 16 decide
// where those begin, so that every store but a run's first and last is one of 16 bytes; loads are as wide as the part that
// source and destination have in common in their addresses. 16 bytes that reach into the next rank's part, or over the run's
// ends, go byte by byte.
//   bytes: one read and one write of every byte, no arithmetic; 4 x 16 bytes in flight a thread
//   bound: memory. All runs of a launch share one grid: the table of where they lie is an argument of the kernel.
#pragma once
#include "common/launch.cuh"
#include "common/vector.cuh"
#include "gather/unshard_cuda.h"

namespace hybrid::cuda {

constexpr int kUnshardThreads = 256;
constexpr int kUnshardVectors = 4;  // of 16 bytes, a thread
constexpr int kUnshardBlockBytes = 16 * kUnshardThreads * kUnshardVectors;
constexpr int kUnshardTable = 64;  // runs of a launch: 3 KiB of the 4 KiB that arguments may take

struct UnshardTable {
  struct Run {
    int64_t column, part, start, size, offset;  // as in UnshardArgs
    int64_t block;                              // the grid's first of this run
  } run[kUnshardTable];
  int count;
};

struct UnshardLaunch {
  const uint8_t* shards;
  uint8_t* out;
  int64_t shard;
};

__host__ __device__ __forceinline__ int address_within_16(const void* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16);
}

// 16 bytes from an address that is a multiple of Word's size.
template <typename Word>
__device__ __forceinline__ uint4 load_16_as(const uint8_t* p) {
  unsigned words[4] = {};
#pragma unroll
  for (int i = 0; i < static_cast<int>(16 / sizeof(Word)); ++i) {
    constexpr int kIn32 = static_cast<int>(4 / sizeof(Word));
    words[i / kIn32] |= static_cast<unsigned>(load_as<Word>(p + i * sizeof(Word))) << (8 * sizeof(Word) * (i % kIn32));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ uint4 load_16_from(const uint8_t* p) {
  const int odd = address_within_16(p);
  if (odd == 0) return load_16(p);
  if (odd % 4 == 0) return load_16_as<uint32_t>(p);
  if (odd % 2 == 0) return load_16_as<uint16_t>(p);
  return load_16_as<uint8_t>(p);
}

// Where a byte of the parameter lies.
struct ShardPlace {
  int64_t rank, within;

  // `ahead` bytes further, at most a block's.
  __device__ __forceinline__ ShardPlace advanced(int ahead, int64_t part) const {
    const int64_t at = within + ahead;
    if (at < part) return {rank, at};
    const unsigned past = static_cast<unsigned>(at), size = static_cast<unsigned>(part);  // part <= at < part + 16 KiB
    if (at <= UINT32_MAX) return {rank + past / size, past % size};
    return {rank + 1, at - part};
  }
};

__global__ void __launch_bounds__(kUnshardThreads) unshard_kernel(UnshardLaunch p, UnshardTable table) {
  int index = 0;
  for (int step = kUnshardTable / 2; step > 0; step /= 2) {
    if (index + step < table.count && table.run[index + step].block <= blockIdx.x) index += step;
  }
  const UnshardTable::Run& run = table.run[index];
  uint8_t* out = p.out + run.offset;
  // Byte 0 of the block is a multiple of 16 in the destination, and up to 15 before the run in its first block.
  const int64_t first = (blockIdx.x - run.block) * kUnshardBlockBytes - address_within_16(out);
  const int skipped = static_cast<int>(larger(-first, 0));  // bytes of the block before the run
  const int64_t origin = first + skipped;
  const ShardPlace base{(run.start + origin) / run.part, (run.start + origin) % run.part};
  const auto source = [&](const ShardPlace& place) {
    return p.shards + place.rank * p.shard + run.column + place.within;
  };
#pragma unroll
  for (int i = 0; i < kUnshardVectors; ++i) {
    const int at = (i * kUnshardThreads + static_cast<int>(threadIdx.x)) * 16;
    const int64_t left = run.size - first - at;
    if (left <= 0) return;
    const int lead = static_cast<int>(larger(skipped - at, 0));  // bytes of this vector before the run
    const ShardPlace place = base.advanced(at + lead - skipped, run.part);
    if (lead == 0 && left >= 16 && place.within + 16 <= run.part) {
      st_global_16(out + first + at, load_16_from(source(place)));
      continue;
    }
    const int end = static_cast<int>(smaller(left, 16));
    for (int byte = lead; byte < end; ++byte) {
      out[first + at + byte] = *source(base.advanced(at + byte - skipped, run.part));
    }
  }
}

void unshard(const UnshardArgs& args, Stream stream) {
  const UnshardLaunch p{reinterpret_cast<const uint8_t*>(args.shards), reinterpret_cast<uint8_t*>(args.out), args.shard};
  UnshardTable table{};
  int64_t blocks = 0;
  for (int64_t r = 0; r < args.runs; ++r) {
    if (args.sizes[r] > 0) {
      table.run[table.count++] = {args.columns[r], args.parts[r], args.starts[r], args.sizes[r], args.offsets[r], blocks};
      blocks += ceil_div(args.sizes[r] + address_within_16(args.out + args.offsets[r]), kUnshardBlockBytes);
    }
    if (table.count > 0 && (table.count == kUnshardTable || r + 1 == args.runs)) {
      launch(unshard_kernel, {dim3(static_cast<unsigned>(blocks)), dim3(kUnshardThreads)}, stream, p, table);
      table.count = 0;
      blocks = 0;
    }
  }
}

}  // namespace hybrid::cuda
