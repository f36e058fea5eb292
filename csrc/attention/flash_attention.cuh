// Attention of many query rows: training, scoring and prefill, over packed keys and values or a paged cache.
//
// A block owns 64 query rows of one sequence (all query heads of a key/value head at as many positions as fit) and 64 columns of
// their output; each of its 4 warps 16 of the rows. It walks the tiles of 64 keys that the rows see. Each is done relative to
// its own maximum and joined in order, four to a chunk of 256 keys, chunk by chunk: the order of paged_attention.cuh, bit for bit,
// so that a token has the same output in prefill, training and decode.
//   flops: 4 head_dim a key and row up to head_dim 64; the scores once more for every further 64 columns (6 head_dim at 128)
//   bytes: 2 head_dim sizeof(T) a key and block of 64 rows, mostly from L2; queries and outputs once
//   bound: arithmetic (matrix units; exponentials at small head_dim)
// 16-bit types: cp.async brings the values while the scores are multiplied and the next keys while the values are; queries stay in shared
// memory. fp32 reads through L1, for exactness rather than speed.
#pragma once
#include "attention/attention_cuda.h"
#include "attention/staged_rows.cuh"
#include "common/launch.cuh"

namespace hybrid::cuda {

constexpr int kFlashWarps = 4;
constexpr int kFlashRows = kFlashWarps * kWarpRows;
static_assert(kFlashRows == kStagedRows && kTileKeys == kStagedRows);
constexpr int kFlashSlices = 2;  // of the output, a block's: twice as many, two sums each, would spill registers

// Keys and values of one tile, wherever they lie.
template <typename T>
struct KvTile {
  const T *k, *v;
  int64_t k_stride, v_stride;
  int count;

  __device__ __forceinline__ KvTile(const FlashAttentionParams<T>& p, const QueryTile& tile, int first_key) {
    count = static_cast<int>(smaller(tile.newest() + 1 - first_key, kTileKeys));
    if (p.block_tables != nullptr) {
      const int64_t block = p.block_tables[int64_t{tile.sequence} * p.max_blocks + first_key / kTileKeys];
      k = p.k + (block * p.kv_heads + tile.kv_head) * 2 * kTileKeys * p.head_dim;
      v = k + kTileKeys * p.head_dim;
      k_stride = v_stride = p.head_dim;
    } else {
      const int64_t row = tile.packed_row - tile.position + first_key;
      k = p.k + row * p.k_stride + tile.kv_head * p.head_dim;
      v = p.v + row * p.v_stride + tile.kv_head * p.head_dim;
      k_stride = p.k_stride;
      v_stride = p.v_stride;
    }
  }
};

// Sums of weights times values, and the softmax that they are relative to, of a warp's rows.
template <typename T, int kSlices>
struct RowSums {
  RowState state[ScoreTile<T>::kRows];
  Slice sum[kSlices];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < ScoreTile<T>::kRows; ++i) state[i] = RowState();
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
#pragma unroll
      for (int i = 0; i < kSliceFloats; ++i) sum[s][i / 4][i % 4] = 0.0f;
    }
  }
};

// The factors with which more keys join, of this lane's rows.
template <typename T>
struct JoinFactors {
  float old[ScoreTile<T>::kRows], fresh[ScoreTile<T>::kRows];

  __device__ __forceinline__ JoinFactors(RowState (&state)[ScoreTile<T>::kRows], const RowState (&more)[ScoreTile<T>::kRows]) {
#pragma unroll
    for (int i = 0; i < ScoreTile<T>::kRows; ++i) {
      const RowState::Factors factors = state[i].join(more[i]);
      old[i] = factors.old;
      fresh[i] = factors.fresh;
    }
  }
  __device__ __forceinline__ void apply(Slice& sum, const Slice& more) const {
#pragma unroll
    for (int i = 0; i < kSliceFloats; ++i) {
      float& own = sum[i / 4][i % 4];
      own = fmaf(own, of_slice_row<T>(old, i), more[i / 4][i % 4] * of_slice_row<T>(fresh, i));
    }
  }
};

// Writes a warp's rows of the output, from column first_col on. 16-bit rows go through their queries' place in shared memory, so that
// stores are of 16 bytes.
template <typename T, int kSlices, typename Index, typename Staging>
__device__ __forceinline__ void write_rows(const FlashAttentionParams<T>& p, const RowSums<T, kSlices>& sums, int first_col,
                                           int rows, const Index& index_of, const Staging& staging, int staged_row) {
  float mass[ScoreTile<T>::kRows];
#pragma unroll
  for (int i = 0; i < ScoreTile<T>::kRows; ++i) mass[i] = sums.state[i].mass;
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
    const int64_t col = first_col + s * kSliceCols;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kSliceFloats; ++i) {
        const float out = sums.sum[s][i / 4][i % 4] / of_slice_row<T>(mass, i);
        const int row = slice_row<T>(i);
        const int64_t at = col + slice_col<T>(i);
        if (row < rows && at < p.head_dim) p.out[index_of(row) * p.head_dim + at] = out;
      }
    } else {
      __syncwarp();  // the queries, or the slice before, are used
#pragma unroll
      for (int i = 0; i < kSliceFloats; i += 2) {
        const float* pair = &sums.sum[s][i / 4][i % 4];
        const float whole = of_slice_row<T>(mass, i);
        const int row = staged_row + slice_row<T>(i), at = slice_col<T>(i);
        char* chunk = reinterpret_cast<char*>(&staging.chunk(row, at / kPack<T>));
        store_4(chunk + at % kPack<T> * sizeof(T),
                word_of(round_to<T>(pair[0] / whole), round_to<T>(pair[1] / whole)));
      }
      __syncwarp();
      constexpr int kChunks = kSliceCols / kPack<T>;
#pragma unroll
      for (int i = 0; i < kWarpRows * kChunks / kWarpSize; ++i) {
        const int at = i * kWarpSize + static_cast<int>(threadIdx.x), row = at / kChunks, within = at % kChunks * kPack<T>;
        if (row >= rows || col + within >= p.head_dim) continue;
        store_words(p.out + index_of(row) * p.head_dim + col + within, staging.chunk(staged_row + row, at % kChunks),
                    p.head_dim - col - within, p.aligned);
      }
    }
  }
}

template <typename T>
struct FlashShared {
  int64_t query_offset[kFlashRows];
  typename ScoreTile<T>::Shared scores[kFlashWarps];
};

// kCols: head_dim at most, for 16-bit types.
template <typename T, int kCols>
__global__ void __launch_bounds__(kWarpSize* kFlashWarps, 1) flash_attention_kernel(FlashAttentionParams<T> p, HeadTiling tiling) {
  constexpr bool kStaged = sizeof(T) == 2;
  constexpr int kSlices = kFlashSlices;
  const int64_t slot = gridDim.x - 1 - blockIdx.x;  // the last rows see the most keys: they start first
  QueryTile tile;
  if (!locate_queries({p.cu_q, p.kv_lengths, p.batch}, tiling, p.heads / p.kv_heads, slot, blockIdx.y, tile)) return;
  FlashShared<T>& shared = shared_memory<FlashShared<T>>();
  const int warp = threadIdx.y, thread = warp * kWarpSize + threadIdx.x, own = warp * kWarpRows;
  const int first_col = static_cast<int>(blockIdx.z) * kSlices * kSliceCols;
  if (thread < kFlashRows) {  // rows beyond the last repeat the first
    const int row = thread < tile.rows ? thread : 0;
    shared.query_offset[thread] = tile.row_of(row) * p.q_stride + tile.head_of(row) * p.head_dim;
  }
  __syncthreads();

  const auto query_offset = [&](int row) { return shared.query_offset[row]; };
  const RowsSource query_rows{p.q, query_offset, kFlashRows, p.head_dim, p.aligned};
  uint4* memory = nullptr;
  if constexpr (kStaged) memory = dynamic_shared_memory<uint4>();
  [[maybe_unused]] StagedRows<T, kCols> queries(memory), keys(memory);
  [[maybe_unused]] StagedRows<T, kSlices * kSliceCols> values(memory);
  const auto stage_keys = [&](const KvTile<T>& kv) {
    keys.start_copy(RowsSource{kv.k, [&](int row) { return row * kv.k_stride; }, kv.count, p.head_dim, p.aligned}, 0);
    cp_async_commit();
  };
  const auto stage_values = [&](const KvTile<T>& kv) {
    values.start_copy(RowsSource{kv.v, [&](int row) { return row * kv.v_stride; }, kv.count, p.head_dim, p.aligned}, first_col);
    cp_async_commit();
  };

  const int first_tile = static_cast<int>(oldest_key(tile.position, p.window) / kTileKeys), last_tile = tile.newest() / kTileKeys;
  ScoreTile<T> scores(shared.scores[warp]);
  const RowPlaces<T> places(tile, own, p.alibi_slopes, [&](int row) { return tile.position_of(row); });
  RowSums<T, kSlices> chunk, all;
  chunk.clear();
  all.clear();
  if constexpr (kStaged) {
    queries.start_copy(query_rows, 0);
    stage_keys(KvTile<T>(p, tile, first_tile * kTileKeys));
  }
  for (int index = first_tile; index <= last_tile; ++index) {
    const KvTile<T> kv(p, tile, index * kTileKeys);
    if constexpr (kStaged) {
      cp_async_wait<0>();
      __syncthreads();
      stage_values(kv);
      scores.multiply(StagedView{queries, own}, StagedView{keys, 0}, p.head_dim);
    } else {
      const RowsSource key_rows{kv.k, [&](int row) { return row * kv.k_stride; }, kv.count, p.head_dim, p.aligned};
      scores.multiply(RowsInPlace{query_rows, own}, RowsInPlace{key_rows, 0}, p.head_dim);
    }
    RowState state[ScoreTile<T>::kRows];
    softmax_tile(scores, places, {p.scale, p.window}, index * kTileKeys, state);
    const JoinFactors<T> join(chunk.state, state);
    if constexpr (kStaged) {
      cp_async_wait<0>();
      __syncthreads();
      if (index + 1 <= last_tile) stage_keys(KvTile<T>(p, tile, (index + 1) * kTileKeys));
    }
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      Slice slice = {};
      if constexpr (kStaged) {
        add_values(scores, StagedView{values, 0}, s * kSliceCols, slice);
      } else {
        const RowsSource value_rows{kv.v, [&](int row) { return row * kv.v_stride; }, kv.count, p.head_dim, p.aligned};
        add_values(scores, RowsInPlace{value_rows, 0}, first_col + s * kSliceCols, slice);
      }
      join.apply(chunk.sum[s], slice);
    }
    if (index % kChunkTiles == kChunkTiles - 1 || index == last_tile) {
      const JoinFactors<T> join_chunk(all.state, chunk.state);
#pragma unroll
      for (int s = 0; s < kSlices; ++s) join_chunk.apply(all.sum[s], chunk.sum[s]);
      chunk.clear();
    }
  }

  const int rows = static_cast<int>(larger(smaller(tile.rows - own, kWarpRows), 0));
  const auto index_of = [&](int row) { return tile.row_of(own + row) * p.heads + tile.head_of(own + row); };
  write_rows(p, all, first_col, rows, index_of, queries, own);
  if (first_col > 0) return;
#pragma unroll
  for (int i = 0; i < ScoreTile<T>::kRows; ++i) {
    const int row = ScoreTile<T>::row(i);
    if (row >= rows || threadIdx.x % ScoreTile<T>::kLanes != 0) continue;
    p.lse[tile.head_of(own + row) * p.rows + tile.row_of(own + row)] = all.state[i].max + logf(all.state[i].mass);
  }
}

template <typename T, int kCols>
void launch_flash_attention(const FlashAttentionParams<T>& p, Stream stream) {
  constexpr int kOwnCols = kFlashSlices * kSliceCols;
  const HeadTiling tiling(p.heads / p.kv_heads, kFlashRows);
  const dim3 grid(static_cast<unsigned>(tile_slots(p.rows, p.batch, tiling.positions)),
                  static_cast<unsigned>(p.kv_heads * tiling.tiles),
                  static_cast<unsigned>(ceil_div(p.head_dim, kOwnCols)));
  const size_t staged = sizeof(T) == 2 ? 2 * StagedRows<T, kCols>::kBytes + StagedRows<T, kOwnCols>::kBytes : 0;
  launch(flash_attention_kernel<T, kCols>, {grid, dim3(kWarpSize, kFlashWarps), staged}, stream, p, tiling);
}

template <typename T>
void flash_attention(FlashAttentionParams<T> p, Stream stream) {
  if (p.rows == 0 || p.heads == 0) return;
  p.aligned = packs_aligned(p.head_dim, p.q, p.k, p.v, p.out) && p.q_stride % kPack<T> == 0 && p.k_stride % kPack<T> == 0 &&
              p.v_stride % kPack<T> == 0;
  if constexpr (sizeof(T) == 2) {
    if (p.head_dim > 128) return launch_flash_attention<T, 256>(p, stream);
    if (p.head_dim > 64) return launch_flash_attention<T, 128>(p, stream);
  }
  launch_flash_attention<T, 64>(p, stream);
}

}  // namespace hybrid::cuda
