// Attention over a paged cache: few query rows, many keys.
//
// A block owns 256 keys of one sequence (at absolute positions) for one key/value head, and 16 query rows: all query heads of that
// key/value head, at as many positions as fit. Each of its 4 warps takes a tile of 64 keys: 16 x 64 scores (mma m16n8k16 for 16-bit
// types), their softmax, and 16 x 64 slices of the values. The block joins its tiles in order; a second kernel joins the chunks in
// order. So no sum depends on the batch, and a row's bits are its own: keys that it may not see weigh 0 exactly.
//   bytes: 2 head_dim sizeof(T) a key and key/value head, once (the rows of the heads share them); 4 (head_dim + 2) written and read
//   again a row, head and chunk of 256 keys; flops: 4 head_dim a key and row, on 16 rows at a time
//   bound: memory, while the rows of a sequence fit one tile; a chunk has 64 KiB at head_dim 64
// Keys and values go from global memory into registers by 16-byte loads, 8 in flight a thread: no two warps share them, so a detour
// through shared memory would only cost barriers. What makes that fit the fragments of mma is a free choice of order: the products of
// a score may be added in any order of head_dim, and columns of the output may be any.
#pragma once
#include "attention/attention_cuda.h"
#include "common/launch.cuh"
#include "common/matrix_rows.cuh"
#include "common/shared.cuh"

namespace hybrid::cuda {

constexpr int kQueryRows = 16;                                        // of an mma tile
constexpr int kChunkWarps = static_cast<int>(kAttentionChunk / kKvTile);  // a key tile each
constexpr int kTileKeys = static_cast<int>(kKvTile);
constexpr int kValueCols = 64;                                        // columns of a slice of the values
constexpr int kTileStride = kTileKeys + 4;                            // floats between rows: fewer bank conflicts

// A 16 x 64 tile of one warp in shared memory.
using AttentionTile = float[kQueryRows][kTileStride];

struct AttentionShared {
  struct Warp {
    alignas(16) AttentionTile weights, values;  // scores and then their exponentials; a slice of weights times values
    float max[kQueryRows], mass[kQueryRows];    // of each row's scores; sum of the exponentials
  } warp[kChunkWarps];
  int64_t query_offset[kQueryRows];  // of each query row, in elements
};

// The query rows of a block: `heads` query heads, the fastest index, at each of `positions` places of one sequence.
struct QueryTile {
  int64_t sequence, packed_row, position;  // of the first row
  int first_head, heads, rows;

  __device__ __forceinline__ int64_t position_of(int row) const { return position + row / heads; }
  __device__ __forceinline__ int head_of(int row) const { return first_head + row % heads; }
  __device__ __forceinline__ int64_t index_of(int row, int64_t all_heads) const {  // into [rows, heads]
    return (packed_row + row / heads) * all_heads + head_of(row);
  }
};

// Query heads in a tile, and tiles that the heads of a key/value head need.
struct HeadTiling {
  int heads, tiles, positions;
  __host__ __device__ explicit HeadTiling(int64_t group)
      : heads(static_cast<int>(smaller(group, kQueryRows))),
        tiles(static_cast<int>(ceil_div(group, kQueryRows))),
        positions(kQueryRows / heads) {}
};

// The last sequence b with first(b) <= index.
template <typename First>
__device__ __forceinline__ int64_t find_sequence(int64_t batch, int64_t index, const First& first) {
  int64_t low = 0, high = batch;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first(middle) <= index ? low : high) = middle;
  }
  return low;
}

// Slots are numbered so that sequence b begins at cu_q[b] / positions + b, which leaves room for its tiles whatever the lengths are.
// False where a slot stays empty.
template <typename T>
__device__ __forceinline__ bool locate_queries(const PagedAttentionParams<T>& p, const HeadTiling& tiling, QueryTile& tile) {
  const auto first_slot = [&](int64_t b) { return p.cu_q[b] / tiling.positions + b; };
  const int64_t slot = blockIdx.x;
  const int64_t b = find_sequence(p.batch, slot, first_slot);
  const int64_t skipped = (slot - first_slot(b)) * tiling.positions;
  const int64_t left = p.cu_q[b + 1] - p.cu_q[b] - skipped;
  if (left <= 0) return false;
  const int64_t group = p.heads / p.kv_heads;
  const int within = static_cast<int>(blockIdx.z % tiling.tiles) * kQueryRows;  // heads of the group before this tile's
  tile.sequence = b;
  tile.packed_row = p.cu_q[b] + skipped;
  tile.position = p.kv_lengths[b] - left;
  tile.first_head = static_cast<int>(blockIdx.z / tiling.tiles * group) + within;
  tile.heads = static_cast<int>(smaller(tiling.heads, group - within));
  tile.rows = static_cast<int>(smaller(tiling.positions, left)) * tile.heads;
  return true;
}

// First key that a query at this position sees.
__device__ __forceinline__ int64_t oldest_key(int64_t position, int64_t window) {
  return window > 0 && position >= window ? position - window + 1 : 0;
}

// The 16 query rows, wherever they lie.
template <typename T>
struct QueryRows {
  const T* q;
  const int64_t* offset;  // of each row
  int64_t dim;
  bool aligned;

  __device__ __forceinline__ uint4 load(int row, int64_t col) const {
    return load_words(q + offset[row] + col, dim - col, aligned);
  }
};

// ---- 16-bit types: matrix instructions ---------------------------------------------------------------------------------------

// Scores of the query rows with the keys. Lane 4g + t loads 8 elements of rows g and g + 8 and of keys g, g + 8, ... at columns 8t,
// 8t + 32, ...: two steps of mma, whose 16 products are those of 4 lanes times 4 elements.
template <typename T>
__device__ __forceinline__ void multiply_keys(const QueryRows<T>& query, const MatrixRows<T>& keys, AttentionTile& scores) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  float sum[kTileKeys / 8][4] = {};
  for (int64_t base = 0; base < keys.dim; base += 32) {
    const int64_t col = base + 8 * t;
    const uint4 upper = query.load(g, col), lower = query.load(g + 8, col);
    uint4 key[kTileKeys / 8];
#pragma unroll
    for (int j = 0; j < kTileKeys / 8; ++j) key[j] = keys.load(8 * j + g, col);
#pragma unroll
    for (int j = 0; j < kTileKeys / 8; ++j) {
      mma_m16n8k16<T>(sum[j], {upper.x, lower.x, upper.y, lower.y}, {key[j].x, key[j].y});
      mma_m16n8k16<T>(sum[j], {upper.z, lower.z, upper.w, lower.w}, {key[j].z, key[j].w});
    }
  }
#pragma unroll
  for (int j = 0; j < kTileKeys / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[g + i / 2 * 8][8 * j + 2 * t + i % 2] = sum[j][i];
  }
}

// weights [16, 64] times the values' columns col .. col + 64. Lane 4g + t loads columns 8g .. 8g + 8 of 4 keys; the j-th of the 8
// is column g of the j-th matrix.
template <typename T>
__device__ __forceinline__ void multiply_values(const AttentionTile& weights, const MatrixRows<T>& values, int64_t col,
                                                AttentionTile& out) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto pair = [&](int row, int key) {
    return word_of(round_to<T>(weights[row][key]), round_to<T>(weights[row][key + 1]));
  };
  float sum[8][4] = {};
#pragma unroll 2
  for (int base = 0; base < kTileKeys; base += 16) {
    const int key = base + 2 * t;
    const uint4 v0 = values.load(key, col + 8 * g), v1 = values.load(key + 1, col + 8 * g);
    const uint4 v8 = values.load(key + 8, col + 8 * g), v9 = values.load(key + 9, col + 8 * g);
    const uint32_t a[4] = {pair(g, key), pair(g + 8, key), pair(g, key + 8), pair(g + 8, key + 8)};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      mma_m16n8k16<T>(sum[j], a,
                      {word_of(element<T>(v0, j), element<T>(v1, j)), word_of(element<T>(v8, j), element<T>(v9, j))});
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[g + i / 2 * 8][8 * (2 * t + i % 2) + j] = sum[j][i];
  }
}

// ---- fp32: multiply-adds, in the order of head_dim and of the keys -----------------------------------------------------------

// A lane owns two keys and all rows, whose elements are the same for all lanes.
__device__ __forceinline__ void multiply_keys(const QueryRows<float>& query, const MatrixRows<float>& keys,
                                              AttentionTile& scores) {
  const int lane = threadIdx.x;
  float sum[2][kQueryRows] = {};
  for (int64_t col = 0; col < keys.dim; col += kPack<float>) {
    const uint4 key0 = keys.load(lane, col), key1 = keys.load(lane + kWarpSize, col);
#pragma unroll
    for (int row = 0; row < kQueryRows; ++row) {
      const uint4 q = query.load(row, col);
#pragma unroll
      for (int i = 0; i < kPack<float>; ++i) {
        sum[0][row] = fmaf(element<float>(q, i), element<float>(key0, i), sum[0][row]);
        sum[1][row] = fmaf(element<float>(q, i), element<float>(key1, i), sum[1][row]);
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kQueryRows; ++row) {
    scores[row][lane] = sum[0][row];
    scores[row][lane + kWarpSize] = sum[1][row];
  }
}

// A lane owns columns `lane` and `lane` + 32 of the slice.
__device__ __forceinline__ void multiply_values(const AttentionTile& weights, const MatrixRows<float>& values, int64_t col,
                                                AttentionTile& out) {
  const int lane = threadIdx.x;
  float sum[2][kQueryRows] = {};
#pragma unroll 4
  for (int key = 0; key < kTileKeys; ++key) {
    const float v0 = values.value(key, col + lane), v1 = values.value(key, col + lane + kWarpSize);
#pragma unroll
    for (int row = 0; row < kQueryRows; ++row) {
      sum[0][row] = fmaf(weights[row][key], v0, sum[0][row]);
      sum[1][row] = fmaf(weights[row][key], v1, sum[1][row]);
    }
  }
#pragma unroll
  for (int row = 0; row < kQueryRows; ++row) {
    out[row][lane] = sum[0][row];
    out[row][lane + kWarpSize] = sum[1][row];
  }
}

// ---- one tile, one chunk, all chunks -----------------------------------------------------------------------------------------

// Turns scores into exp(score - max), rounded as the product with the values takes them, and 0 for keys that the row does not see;
// their maximum (-inf where it sees none) and sum beside them. Two lanes share a row.
template <typename T>
__device__ __forceinline__ void softmax_tile(const PagedAttentionParams<T>& p, const QueryTile& tile, int64_t first_key,
                                             AttentionShared::Warp& mine) {
  const int row = threadIdx.x / 2, begin = threadIdx.x % 2 * (kTileKeys / 2);
  int low = 0, high = 0;  // the keys that the row sees, from the tile's first
  int64_t at = 0;         // the row's own place among them
  float slope = 0.0f;
  if (row < tile.rows) {
    const int64_t position = tile.position_of(row);
    at = position - first_key;
    const int64_t oldest = oldest_key(position, p.window) - first_key;
    low = static_cast<int>(oldest > 0 ? smaller(oldest, kTileKeys) : 0);
    high = static_cast<int>(at < 0 ? 0 : smaller(at + 1, kTileKeys));
    if (p.alibi_slopes != nullptr) slope = p.alibi_slopes[tile.head_of(row)];
  }
  float* weights = mine.weights[row];
  float top = -INFINITY;
#pragma unroll 4
  for (int key = begin; key < begin + kTileKeys / 2; ++key) {
    const bool seen = key >= low && key < high;
    const float score = fmaf(slope, static_cast<float>(key - at), weights[key] * p.scale);
    weights[key] = seen ? score : -INFINITY;
    top = seen ? fmaxf(top, score) : top;
  }
  top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
  float mass = 0.0f;
#pragma unroll 4
  for (int key = begin; key < begin + kTileKeys / 2; ++key) {
    const float weight = top > -INFINITY ? rounded<T>(expf(weights[key] - top)) : 0.0f;
    weights[key] = weight;
    mass += weight;
  }
  mass += __shfl_xor_sync(kAllLanes, mass, 1);
  if (begin > 0) return;
  mine.max[row] = top;
  mine.mass[row] = mass;
}

// What multiplies sums that were taken relative to `max` when they join others under `top`.
__device__ __forceinline__ float rescale(float max, float top) { return max > -INFINITY ? expf(max - top) : 0.0f; }

template <typename T>
__global__ void __launch_bounds__(kWarpSize* kChunkWarps)
    paged_attention_kernel(PagedAttentionParams<T> p, HeadTiling tiling, bool aligned) {
  QueryTile tile;
  if (!locate_queries(p, tiling, tile)) return;
  const int64_t newest = tile.position_of(tile.rows - 1), oldest = oldest_key(tile.position, p.window);
  const int64_t chunk_key = blockIdx.y * kAttentionChunk;
  if (chunk_key > newest || chunk_key + kAttentionChunk <= oldest) return;

  AttentionShared& shared = shared_memory<AttentionShared>();
  const int warp = threadIdx.y, thread = warp * kWarpSize + threadIdx.x;
  AttentionShared::Warp& mine = shared.warp[warp];
  if (thread < kQueryRows) {  // rows beyond the last repeat the first
    shared.query_offset[thread] = tile.index_of(thread < tile.rows ? thread : 0, p.heads) * p.head_dim;
  }
  __syncthreads();

  const int64_t first_key = chunk_key + warp * kTileKeys;
  MatrixRows<T> keys{p.cache, p.head_dim, 0, aligned};
  if (first_key <= newest && first_key + kTileKeys > oldest) {
    const int64_t block = p.block_tables[tile.sequence * p.max_blocks + first_key / kTileKeys];
    const int64_t kv_head = blockIdx.z / tiling.tiles;
    keys.rows = p.cache + (block * p.kv_heads + kv_head) * 2 * kTileKeys * p.head_dim;
    keys.count = static_cast<int>(smaller(newest + 1 - first_key, kTileKeys));
  }
  multiply_keys(QueryRows<T>{p.q, shared.query_offset, p.head_dim, aligned}, keys, mine.weights);
  __syncwarp();
  softmax_tile(p, tile, first_key, mine);
  __syncthreads();

  const int64_t chunks = attention_chunks(p.max_blocks);
  const auto partial = [&](int row) {
    return p.partial + (tile.index_of(row, p.heads) * chunks + blockIdx.y) * (p.head_dim + 2);
  };
  const auto chunk_max = [&](int row) {
    float top = -INFINITY;
#pragma unroll
    for (int w = 0; w < kChunkWarps; ++w) top = fmaxf(top, shared.warp[w].max[row]);
    return top;
  };
  if (thread < tile.rows) {
    const float top = chunk_max(thread);
    float mass = 0.0f;
#pragma unroll
    for (int w = 0; w < kChunkWarps; ++w) mass = fmaf(shared.warp[w].mass[thread], rescale(shared.warp[w].max[thread], top), mass);
    partial(thread)[p.head_dim] = top;
    partial(thread)[p.head_dim + 1] = mass;
  }
  const MatrixRows<T> values{keys.rows + kTileKeys * p.head_dim, p.head_dim, keys.count, aligned};
  for (int64_t col = 0; col < p.head_dim; col += kValueCols) {
    multiply_values(mine.weights, values, col, mine.values);
    __syncthreads();
    for (int i = thread; i < tile.rows * kValueCols; i += kWarpSize * kChunkWarps) {
      const int row = i / kValueCols, within = i % kValueCols;
      if (col + within >= p.head_dim) continue;
      const float top = chunk_max(row);
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kChunkWarps; ++w) {
        sum = fmaf(shared.warp[w].values[row][within], rescale(shared.warp[w].max[row], top), sum);
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

  float top = -INFINITY, mass = 0.0f;
  for (int64_t c = first; c <= last; ++c) top = fmaxf(top, partial[c * stride + p.head_dim]);
  for (int64_t c = first; c <= last; ++c) {
    mass = fmaf(partial[c * stride + p.head_dim + 1], rescale(partial[c * stride + p.head_dim], top), mass);
  }
  for (int64_t col = threadIdx.x; col < p.head_dim; col += kJoinThreads) {
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t c = first; c <= last; ++c) {
      sum = fmaf(partial[c * stride + col], rescale(partial[c * stride + p.head_dim], top), sum);
    }
    p.out[blockIdx.x * p.head_dim + col] = round_to<T>(sum / mass);
  }
  if (threadIdx.x == 0) p.lse[head * p.rows + row] = top + logf(mass);
}

template <typename T>
void paged_attention(const PagedAttentionParams<T>& p, Stream stream) {
  if (p.rows == 0 || p.heads == 0) return;
  const HeadTiling tiling(p.heads / p.kv_heads);
  const bool aligned = packs_aligned(p.head_dim, p.q, p.cache);
  const dim3 grid(static_cast<unsigned>(p.rows / tiling.positions + p.batch),
                  static_cast<unsigned>(attention_chunks(p.max_blocks)),
                  static_cast<unsigned>(p.kv_heads * tiling.tiles));
  launch(paged_attention_kernel<T>, {grid, dim3(kWarpSize, kChunkWarps)}, stream, p, tiling, aligned);
  launch(join_attention_kernel<T>, {dim3(static_cast<unsigned>(p.rows * p.heads)), dim3(kJoinThreads)}, stream, p);
}

}  // namespace hybrid::cuda
