// Samples of one prompt read the prompt's keys from the same blocks, and the block tables say so: neighbouring sequences of a batch
// whose tables agree over a chunk share one reading of it. Nothing else says who shares, so that a recorded launch serves every batch.
#pragma once
#include "attention/attention_cuda.h"
#include "attention/query_tile.cuh"

namespace hybrid::cuda {

// One chunk of every sequence of a batch.
struct SharedChunk {
  const int32_t *block_tables, *kv_lengths, *cu_q;
  int64_t batch, max_blocks, window, first_key;

  // Whether sequence b has one row, which sees every key of the chunk.
  __device__ __forceinline__ bool whole(int64_t b) const {
    const int64_t position = kv_lengths[b] - 1;
    return cu_q[b + 1] - cu_q[b] == 1 && position >= first_key + kAttentionChunk - 1 && oldest_key(position, window) <= first_key;
  }
  // Whether sequence b reads the chunk from the blocks that the one before it reads.
  __device__ __forceinline__ bool follows(int64_t b) const {
    if (b < 1 || b >= batch || !whole(b - 1) || !whole(b)) return false;
    const int32_t* own = block_tables + b * max_blocks + first_key / kKvTile;
    bool same = true;
#pragma unroll
    for (int i = 0; i < kChunkTiles; ++i) same = same && own[i] == own[i - max_blocks];
    return same;
  }

  // How many sequences from b on share b's reading, where at most `most` may (32 or fewer); 0 where b shares an earlier one's. Called
  // by whole warps with the same arguments.
  __device__ __forceinline__ int readers(int64_t b, int most) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    int64_t first = b;  // of the run that b is in
    for (unsigned alone = 0; alone == 0;) {
      alone = ~__ballot_sync(kAllLanes, follows(first - lane));
      first -= alone == 0 ? kWarpSize : __ffs(static_cast<int>(alone)) - 1;
    }
    if ((b - first) % most != 0) return 0;
    return __ffs(static_cast<int>(~__ballot_sync(kAllLanes, lane + 1 < most && follows(b + 1 + lane))));
  }
};

}  // namespace hybrid::cuda
