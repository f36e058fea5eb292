// Attention over a paged cache: few query rows, many keys.
//
// A block owns 256 keys of one sequence (at absolute positions) for one key/value head, and 16 query rows: all query heads of that
// key/value head, at as many positions as fit; or, where neighbouring sequences with a row each have these keys in the same blocks
// (samples of one prompt: shared_chunk.cuh), of as many sequences as fit. Each of its 4 warps takes a tile of 64 keys (tile.cuh). The
// block joins its tiles in order; a second kernel joins the chunks in order. So no sum depends on the batch, and a row's bits are its
// own: keys that it may not see weigh 0 exactly, and rows of a tile do not meet. flash_attention.cuh, for many rows, has the same order.
//   bytes: 2 head_dim sizeof(T) a key and key/value head, once for 16 rows of heads and samples; 4 (head_dim + 2) written and read
//   again a row, head and chunk of 256 keys; flops: 4 head_dim a key and row, on 16 rows at a time
//   bound: memory, while the rows of a sequence fit one tile; a chunk has 64 KiB at head_dim 64
// Keys and values go from global memory into registers by 16-byte loads, 8 in flight a thread: no two warps share them, so a detour
// through shared memory would only cost barriers. What makes that fit the fragments of mma is a free choice of order: the products of
// a score may be added in any order of head_dim, and columns of the output may be any.
#pragma once
#include "attention/attention_cuda.h"
#include "attention/shared_chunk.cuh"
#include "attention/tile.cuh"
#include "common/launch.cuh"
#include "common/matrix_rows.cuh"

namespace hybrid::cuda {

constexpr int kChunkWarps = kChunkTiles;  // a key tile each

constexpr int kValueCols = 64;  // of the values at once

// Query rows, wherever they lie.
template <typename T>
struct QueryRows {
  const T* q;
  const int64_t* offset;  // of each row, in elements
  int64_t dim;
  bool aligned;

  __device__ __forceinline__ uint4 load(int row, int64_t col) const {
    return load_words(q + offset[row] + col, dim - col, aligned);
  }
};

// What the block's warps leave for it to join.
template <typename T>
struct PagedShared {
  int64_t query_offset[kWarpRows];
  int position[kWarpRows];
  typename ScoreTile<T>::Shared scores[kChunkWarps];
  AttentionTile values[kChunkWarps];           // a slice of weights times values
  RowState state[kChunkWarps][kWarpRows];      // of each tile
  RowState::Factors join[kChunkWarps][kWarpRows];
};

// weights [16, 64] times the values' columns col .. col + 64. Lane 4g + t loads columns 8g .. 8g + 8 of 4 keys; the j-th of the 8
// is column g of the j-th matrix.
template <typename T>
__device__ __forceinline__ void multiply_values(const ScoreTile<T>& weights, const MatrixRows<T>& values, int64_t col,
                                                AttentionTile& out) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  float sum[8][4] = {};
#pragma unroll
  for (int step = 0; step < kTileKeys / 16; ++step) {
    const int key = 16 * step + 2 * t;
    const uint4 v0 = values.load(key, col + 8 * g), v1 = values.load(key + 1, col + 8 * g);
    const uint4 v8 = values.load(key + 8, col + 8 * g), v9 = values.load(key + 9, col + 8 * g);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      mma_m16n8k16<T>(sum[j], weights.operand[step],
                      {word_of(element<T>(v0, j), element<T>(v1, j)), word_of(element<T>(v8, j), element<T>(v9, j))});
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[g + i / 2 * 8][8 * (2 * t + i % 2) + j] = sum[j][i];
  }
}

__device__ __forceinline__ void multiply_values(const ScoreTile<float>& weights, const MatrixRows<float>& values, int64_t col,
                                                AttentionTile& out) {
#pragma unroll
  for (int half = 0; half < kValueCols; half += kSliceCols) {
    Slice slice = {};
    add_values(weights, values, col + half, slice);
#pragma unroll
    for (int row = 0; row < kWarpRows; ++row) out[row][half + threadIdx.x] = slice[row / 4][row % 4];
  }
}

template <typename T>
__global__ void __launch_bounds__(kWarpSize* kChunkWarps, 1)
    paged_attention_kernel(PagedAttentionParams<T> p, HeadTiling tiling, bool aligned) {
  QueryTile tile;
  const Sequences batch{p.cu_q, p.kv_lengths, p.batch};
  if (!locate_queries(batch, tiling, p.heads / p.kv_heads, blockIdx.x, blockIdx.z, tile)) return;
  const int64_t newest = tile.newest(), oldest = oldest_key(tile.position, p.window);
  const int64_t chunk_key = blockIdx.y * kAttentionChunk;
  if (chunk_key > newest || chunk_key + kAttentionChunk <= oldest) return;
  int readers = 1;  // sequences
  if (tiling.positions > 1) {
    const SharedChunk chunk{p.block_tables, p.kv_lengths, p.cu_q, p.batch, p.max_blocks, p.window, chunk_key};
    readers = chunk.readers(tile.sequence, tiling.positions);
    if (readers == 0) return;  // an earlier sequence's block does it
    if (readers > 1) tile.rows = readers * tile.heads;
  }

  PagedShared<T>& shared = shared_memory<PagedShared<T>>();
  const int warp = threadIdx.y, thread = warp * kWarpSize + threadIdx.x;
  const auto index_of = [&](int row) { return tile.row_of(row) * p.heads + tile.head_of(row); };
  if (thread < kWarpRows) {  // rows beyond the last repeat the first
    const int row = thread < tile.rows ? thread : 0;
    shared.query_offset[thread] = tile.row_of(row) * p.q_stride + tile.head_of(row) * p.head_dim;
    shared.position[thread] = readers > 1 ? p.kv_lengths[tile.sequence + row / tile.heads] - 1 : tile.position_of(row);
  }
  __syncthreads();

  const int64_t first_key = chunk_key + warp * kTileKeys;
  MatrixRows<T> keys{p.cache, p.head_dim, 0, aligned};
  if (first_key <= newest && first_key + kTileKeys > oldest) {
    const int64_t block = p.block_tables[int64_t{tile.sequence} * p.max_blocks + first_key / kTileKeys];
    keys.rows = p.cache + (block * p.kv_heads + tile.kv_head) * 2 * kTileKeys * p.head_dim;
    keys.count = static_cast<int>(smaller(newest + 1 - first_key, kTileKeys));
  }
  ScoreTile<T> scores(shared.scores[warp]);
  scores.multiply(QueryRows<T>{p.q, shared.query_offset, p.head_dim, aligned}, keys, p.head_dim);
  RowState state[ScoreTile<T>::kRows];
  const RowPlaces<T> places(tile, 0, p.alibi_slopes, [&](int row) { return shared.position[row]; });
  softmax_tile(scores, places, {p.scale, p.window}, first_key, state);
#pragma unroll
  for (int i = 0; i < ScoreTile<T>::kRows; ++i) {
    if (threadIdx.x % ScoreTile<T>::kLanes == 0) shared.state[warp][ScoreTile<T>::row(i)] = state[i];
  }
  __syncthreads();

  const int64_t chunks = attention_chunks(p.max_blocks);
  const auto partial = [&](int row) { return p.partial + (index_of(row) * chunks + blockIdx.y) * (p.head_dim + 2); };
  if (thread < tile.rows) {
    RowState joined;
#pragma unroll
    for (int w = 0; w < kChunkWarps; ++w) shared.join[w][thread] = joined.join(shared.state[w][thread]);
    partial(thread)[p.head_dim] = joined.max;
    partial(thread)[p.head_dim + 1] = joined.mass;
  }
  const MatrixRows<T> values{keys.rows + kTileKeys * p.head_dim, p.head_dim, keys.count, aligned};
  for (int64_t col = 0; col < p.head_dim; col += kValueCols) {
    multiply_values(scores, values, col, shared.values[warp]);
    __syncthreads();
    for (int i = thread; i < tile.rows * kValueCols; i += kWarpSize * kChunkWarps) {
      const int row = i / kValueCols, within = i % kValueCols;
      if (col + within >= p.head_dim) continue;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kChunkWarps; ++w) {
        const RowState::Factors join = shared.join[w][row];
        sum = fmaf(sum, join.old, shared.values[w][row][within] * join.fresh);
      }
      partial(row)[col + within] = sum;
    }
    __syncthreads();
  }
}

constexpr int kJoinThreads = 128;

// Joins the chunks of one row and head, in order. Reads 4 (head_dim + 2) bytes a chunk; bound: memory, or launch where there are few.
template <typename T>
__global__ void __launch_bounds__(kJoinThreads) join_attention_kernel(PagedAttentionParams<T> p) {
  const int64_t row = blockIdx.x / p.heads, head = blockIdx.x % p.heads;
  const int64_t b = find_sequence(p.batch, row, [&](int64_t i) { return p.cu_q[i]; });
  const int64_t position = p.kv_lengths[b] - (p.cu_q[b + 1] - row);
  const int64_t chunks = attention_chunks(p.max_blocks), stride = p.head_dim + 2;
  const int64_t first = oldest_key(position, p.window) / kAttentionChunk, last = position / kAttentionChunk;
  const float* partial = p.partial + blockIdx.x * chunks * stride;

  for (int64_t col = threadIdx.x; col < p.head_dim + 1; col += kJoinThreads) {  // the last one: the log-sum-exp
    RowState state;
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t c = first; c <= last; ++c) {
      const float* chunk = partial + c * stride;
      const RowState::Factors join = state.join({chunk[p.head_dim], chunk[p.head_dim + 1]});
      if (col < p.head_dim) sum = fmaf(sum, join.old, chunk[col] * join.fresh);
    }
    if (col < p.head_dim) {
      p.out[blockIdx.x * p.head_dim + col] = round_to<T>(sum / state.mass);
    } else {
      p.lse[head * p.rows + row] = state.max + logf(state.mass);
    }
  }
}

template <typename T>
void paged_attention(const PagedAttentionParams<T>& p, Stream stream) {
  if (p.rows == 0 || p.heads == 0) return;
  const HeadTiling tiling(p.heads / p.kv_heads, kWarpRows);
  const bool aligned = packs_aligned(p.head_dim, p.q, p.cache) && packs_aligned(p.q_stride, p.q);
  const dim3 grid(static_cast<unsigned>(tile_slots(p.rows, p.batch, tiling.positions)),
                  static_cast<unsigned>(attention_chunks(p.max_blocks)),
                  static_cast<unsigned>(p.kv_heads * tiling.tiles));
  launch(paged_attention_kernel<T>, {grid, dim3(kWarpSize, kChunkWarps)}, stream, p, tiling, aligned);
  launch(join_attention_kernel<T>, {dim3(static_cast<unsigned>(p.rows * p.heads)), dim3(kJoinThreads)}, stream, p);
}

}  // namespace hybrid::cuda
