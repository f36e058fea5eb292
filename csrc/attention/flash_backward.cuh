// Gradients of attention over packed sequences (FlashAttention-2, Dao, 2023), in two kernels instead of one with atomics: each element
// of a gradient is summed by one warp in one order, so the bits are the same on every run.
//   p = exp(scores - lse)    dp = grad_out v^T    ds = p (dp - delta) scale,  delta = sum(grad_out * out)
//   grad_q = ds k            grad_k = ds^T q      grad_v = p^T grad_out
// delta: a warp owns a row. grad_q: a block owns 64 query rows and walks the keys that they see, as in flash_attention.cuh. grad_k and
// grad_v: a block owns 64 keys of a key/value head and walks the query rows that see them, of all its query heads; its tiles are
// transposed, keys down and queries across. A block makes up to kSlices x 32 columns of its gradients, and products anew for others.
//   flops: 14 head_dim a key and row, up to head_dim 64; 22 at 128 (5 products are the least, two are made twice, and for columns
//   beyond 64 four more)
//   bound: arithmetic. 16-bit types: operands of both kinds of product from one copy in shared memory; fp32 through L1
#pragma once
#include "attention/attention_cuda.h"
#include "attention/staged_rows.cuh"
#include "common/launch.cuh"

namespace hybrid::cuda {

constexpr int kBackwardWarps = 4;
constexpr int kBackwardRows = kBackwardWarps * kWarpRows;
constexpr int kBackwardSlices = 2;
static_assert(kBackwardRows == kStagedRows && kTileKeys == kStagedRows);  // both kernels have square tiles

// sum(grad_out * out) of every row and head: [heads, tokens].
template <typename T>
__global__ void __launch_bounds__(kWarpSize* kBackwardWarps) attention_delta_kernel(AttentionBackwardParams<T> p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kBackwardWarps + threadIdx.y;
  if (index >= p.tokens * p.heads) return;
  const T *grad = p.grad_out + index * p.head_dim, *out = p.out + index * p.head_dim;
  float sum = 0.0f;
  for (int64_t col = threadIdx.x * kPack<T>; col < p.head_dim; col += kWarpSize * kPack<T>) {
    const Pack<T> a = load_pack(grad + col, p.head_dim - col, p.aligned), b = load_pack(out + col, p.head_dim - col, p.aligned);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) sum = fmaf(a.value[i], b.value[i], sum);
  }
  sum = reduce_warp(sum);
  if (threadIdx.x == 0) p.delta[index % p.heads * p.tokens + index / p.heads] = sum;
}

// What a query row brings to every product.
struct BackwardRow {
  int position;  // -1: no row
  float slope, lse, delta;

  template <typename T>
  __device__ __forceinline__ BackwardRow(const AttentionBackwardParams<T>& p, const QueryTile& tile, int row) {
    const bool any = row < tile.rows;
    position = any ? static_cast<int>(tile.position_of(row)) : -1;
    const int head = any ? tile.head_of(row) : 0;
    const int64_t at = any ? head * p.tokens + tile.row_of(row) : 0;
    slope = any && p.alibi_slopes != nullptr ? p.alibi_slopes[head] : 0.0f;
    lse = any ? p.lse[at] : 0.0f;
    delta = any ? p.delta[at] : 0.0f;
  }
  BackwardRow() = default;

  // Products of a query and a key, and of grad_out and a value, become p and ds; 0 where the row does not see the key.
  __device__ __forceinline__ void differentiate(const Scoring& scoring, int64_t first_key, int key, float& product,
                                                float& grad) const {
    const int at = static_cast<int>(position - first_key);
    const bool seen = key >= scoring.low(at) && key < scoring.high(at);
    const float weight = seen ? expf(scoring.score(product, slope, key - at) - lse) : 0.0f;
    grad = weight * (grad - delta) * scoring.scale;
    product = weight;
  }
};

// Rows of a packed array: `first` is the first one's address.
template <typename T>
__device__ __forceinline__ auto packed_rows(const T* first, int64_t stride, int count, int64_t dim, bool aligned) {
  return RowsSource{first, [stride](int row) { return row * stride; }, count, dim, aligned};
}

// The rows of a query tile in an array [tokens, heads, head_dim].
template <typename T>
__device__ __forceinline__ auto tile_rows(const T* base, int64_t stride, const QueryTile& tile, int64_t dim, bool aligned) {
  return RowsSource{base, [=](int row) { return tile.row_of(row) * stride + tile.head_of(row) * dim; }, tile.rows, dim, aligned};
}

// Operands of the products: staged for 16-bit types, in place for fp32.
template <typename T, int kCols, typename Offset>
__device__ __forceinline__ auto operand(const StagedRows<T, kCols>& staged, const RowsSource<T, Offset>& source, int first) {
  if constexpr (sizeof(T) == 2) {
    return StagedView{staged, first};
  } else {
    return RowsInPlace{source, first};
  }
}

// sum += weights times values. fp32 adds up each tile by itself: chains as long as a sequence would round too often.
template <typename T, typename Values>
__device__ __forceinline__ void add_part(const ScoreTile<T>& weights, const Values& values, int col, Slice& sum) {
  if constexpr (sizeof(T) == 2) {
    add_values(weights, values, col, sum);
  } else {
    Slice part = {};
    add_values(weights, values, col, part);
#pragma unroll
    for (int i = 0; i < kSliceFloats; ++i) sum[i / 4][i % 4] += part[i / 4][i % 4];
  }
}

// Writes the sums of a warp's rows, from column `col` on.
template <typename T, typename Offset>
__device__ __forceinline__ void write_slices(T* out, const Offset& offset, int rows, int64_t dim, int64_t col,
                                             const Slice (&sum)[kBackwardSlices]) {
#pragma unroll
  for (int s = 0; s < kBackwardSlices; ++s) {
#pragma unroll
    for (int i = 0; i < kSliceFloats; ++i) {
      const int row = slice_row<T>(i);
      const int64_t at = col + s * kSliceCols + slice_col<T>(i);
      if (row < rows && at < dim) out[offset(row) + at] = round_to<T>(sum[s][i / 4][i % 4]);
    }
  }
}

template <typename T>
struct BackwardShared {
  typename ScoreTile<T>::Shared products[kBackwardWarps], grads[kBackwardWarps];
  BackwardRow rows[kTileKeys];
};

template <typename T, int kCols>
__global__ void __launch_bounds__(kWarpSize* kBackwardWarps, 1)
    attention_grad_q_kernel(AttentionBackwardParams<T> p, HeadTiling tiling) {
  constexpr bool kStaged = sizeof(T) == 2;
  QueryTile tile;
  const int64_t slot = gridDim.x - 1 - blockIdx.x;  // the last rows see the most keys: they start first
  if (!locate_queries({p.cu_seqlens, nullptr, p.batch}, tiling, p.heads / p.kv_heads, slot, blockIdx.y, tile)) return;
  BackwardShared<T>& shared = shared_memory<BackwardShared<T>>();
  const int warp = threadIdx.y, own = warp * kWarpRows;
  const int first_col = static_cast<int>(blockIdx.z) * kBackwardSlices * kSliceCols;
  uint4* memory = nullptr;
  if constexpr (kStaged) memory = dynamic_shared_memory<uint4>();
  StagedRows<T, kCols> queries(memory), grads(memory), keys(memory), values(memory);
  const auto query_rows = tile_rows(p.q, p.q_stride, tile, p.head_dim, p.aligned);
  const auto grad_rows = tile_rows(p.grad_out, p.heads * p.head_dim, tile, p.head_dim, p.aligned);
  if constexpr (kStaged) {
    queries.start_copy(query_rows, 0);
    grads.start_copy(grad_rows, 0);
  }

  using Tile = ScoreTile<T>;
  Tile product(shared.products[warp]), grad(shared.grads[warp]);
  BackwardRow rows[Tile::kRows];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) rows[i] = BackwardRow(p, tile, own + Tile::row(i));
  const Scoring scoring{p.scale, p.window};
  Slice sum[kBackwardSlices] = {};
  const int first_tile = static_cast<int>(oldest_key(tile.position, p.window) / kTileKeys), last_tile = tile.newest() / kTileKeys;
  for (int index = first_tile; index <= last_tile; ++index) {
    const int first_key = index * kTileKeys;
    const int count = static_cast<int>(smaller(tile.newest() + 1 - first_key, kTileKeys));
    const int64_t at = int64_t{tile.packed_row - tile.position + first_key} * p.kv_stride + tile.kv_head * p.head_dim;
    const auto key_rows = packed_rows(p.k + at, p.kv_stride, count, p.head_dim, p.aligned);
    const auto value_rows = packed_rows(p.v + at, p.kv_stride, count, p.head_dim, p.aligned);
    if constexpr (kStaged) {
      __syncthreads();  // the keys and values before are used
      keys.start_copy(key_rows, 0);
      values.start_copy(value_rows, 0);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
    }
    product.multiply(operand(queries, query_rows, own), operand(keys, key_rows, 0), p.head_dim);
    grad.multiply(operand(grads, grad_rows, own), operand(values, value_rows, 0), p.head_dim);
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
      for (int k = 0; k < Tile::kKeys; ++k) rows[i].differentiate(scoring, first_key, Tile::key(k), product.at(i, k), grad.at(i, k));
    }
    grad.share();
#pragma unroll
    for (int s = 0; s < kBackwardSlices; ++s) {
      add_part(grad, operand(keys, key_rows, 0), first_col + s * kSliceCols, sum[s]);
    }
  }
  const int count = static_cast<int>(larger(smaller(tile.rows - own, kWarpRows), 0));
  const auto offset = [&](int row) {
    return (tile.row_of(own + row) * p.heads + tile.head_of(own + row)) * p.head_dim;
  };
  write_slices(p.grad_q, offset, count, p.head_dim, first_col, sum);
}

template <typename T, int kCols>
__global__ void __launch_bounds__(kWarpSize* kBackwardWarps, 1)
    attention_grad_kv_kernel(AttentionBackwardParams<T> p, HeadTiling tiling) {
  constexpr bool kStaged = sizeof(T) == 2;
  const auto first_slot = [&](int64_t b) { return p.cu_seqlens[b] / kTileKeys + b; };
  const int64_t sequence = find_sequence(p.batch, blockIdx.x, first_slot);
  const int first_row = p.cu_seqlens[sequence], length = p.cu_seqlens[sequence + 1] - first_row;
  const int first_key = static_cast<int>(blockIdx.x - first_slot(sequence)) * kTileKeys;
  if (first_key >= length) return;
  BackwardShared<T>& shared = shared_memory<BackwardShared<T>>();
  const int warp = threadIdx.y, thread = warp * kWarpSize + threadIdx.x, own = warp * kWarpRows;
  const int kv_head = static_cast<int>(blockIdx.y), first_col = static_cast<int>(blockIdx.z) * kBackwardSlices * kSliceCols;
  const int64_t group = p.heads / p.kv_heads;
  uint4* memory = nullptr;
  if constexpr (kStaged) memory = dynamic_shared_memory<uint4>();
  StagedRows<T, kCols> keys(memory), values(memory), queries(memory), grads(memory);
  const int count = static_cast<int>(smaller(length - first_key, kTileKeys));
  const int64_t at = int64_t{first_row + first_key} * p.kv_stride + kv_head * p.head_dim;
  const auto key_rows = packed_rows(p.k + at, p.kv_stride, count, p.head_dim, p.aligned);
  const auto value_rows = packed_rows(p.v + at, p.kv_stride, count, p.head_dim, p.aligned);
  if constexpr (kStaged) {
    keys.start_copy(key_rows, 0);
    values.start_copy(value_rows, 0);
  }

  using Tile = ScoreTile<T>;
  Tile product(shared.products[warp]), grad(shared.grads[warp]);
  const Scoring scoring{p.scale, p.window};
  Slice grad_k[kBackwardSlices] = {}, grad_v[kBackwardSlices] = {};
  const int64_t end = p.window > 0 ? smaller(length, first_key + count - 1 + p.window) : length;  // of the rows that see a key
  for (int head_tile = 0; head_tile < tiling.tiles; ++head_tile) {
    QueryTile tile;
    tile.kv_head = kv_head;
    tile.first_head = static_cast<int>(kv_head * group) + head_tile * tiling.heads;
    tile.heads = static_cast<int>(smaller(tiling.heads, group - head_tile * tiling.heads));
    for (tile.position = first_key; tile.position < end; tile.position += tiling.positions) {
      tile.packed_row = first_row + tile.position;
      tile.rows = static_cast<int>(smaller(tiling.positions, length - tile.position)) * tile.heads;
      const auto query_rows = tile_rows(p.q, p.q_stride, tile, p.head_dim, p.aligned);
      const auto grad_rows = tile_rows(p.grad_out, p.heads * p.head_dim, tile, p.head_dim, p.aligned);
      __syncthreads();  // the rows before are used
      if constexpr (kStaged) {
        queries.start_copy(query_rows, 0);
        grads.start_copy(grad_rows, 0);
        cp_async_commit();
      }
      if (thread < kTileKeys) shared.rows[thread] = BackwardRow(p, tile, thread);
      if constexpr (kStaged) cp_async_wait<0>();
      __syncthreads();
      product.multiply(operand(keys, key_rows, own), operand(queries, query_rows, 0), p.head_dim);
      grad.multiply(operand(values, value_rows, own), operand(grads, grad_rows, 0), p.head_dim);
#pragma unroll
      for (int k = 0; k < Tile::kKeys; ++k) {
        const BackwardRow row = shared.rows[Tile::key(k)];
#pragma unroll
        for (int i = 0; i < Tile::kRows; ++i) {
          row.differentiate(scoring, first_key, own + Tile::row(i), product.at(i, k), grad.at(i, k));
        }
      }
      product.share();
      grad.share();
#pragma unroll
      for (int s = 0; s < kBackwardSlices; ++s) {
        const int col = first_col + s * kSliceCols;
        add_part(product, operand(grads, grad_rows, 0), col, grad_v[s]);
        add_part(grad, operand(queries, query_rows, 0), col, grad_k[s]);
      }
    }
  }
  const auto offset = [&](int row) { return (int64_t{first_row + first_key + own + row} * p.kv_heads + kv_head) * p.head_dim; };
  const int rows = static_cast<int>(larger(smaller(count - own, kWarpRows), 0));
  write_slices(p.grad_k, offset, rows, p.head_dim, first_col, grad_k);
  write_slices(p.grad_v, offset, rows, p.head_dim, first_col, grad_v);
}

// kCols: head_dim at most, for 16-bit types.
template <typename T, int kCols>
void launch_attention_backward(const AttentionBackwardParams<T>& p, Stream stream) {
  const HeadTiling tiling(p.heads / p.kv_heads, kBackwardRows);
  const dim3 block(kWarpSize, kBackwardWarps);
  const size_t staged = sizeof(T) == 2 ? 4 * StagedRows<T, kCols>::kBytes : 0;
  const auto columns = static_cast<unsigned>(ceil_div(p.head_dim, kBackwardSlices * kSliceCols));
  launch(attention_delta_kernel<T>, {dim3(static_cast<unsigned>(ceil_div(p.tokens * p.heads, kBackwardWarps))), block}, stream, p);
  const dim3 query_grid(static_cast<unsigned>(tile_slots(p.tokens, p.batch, tiling.positions)),
                        static_cast<unsigned>(p.kv_heads * tiling.tiles), columns);
  launch(attention_grad_q_kernel<T, kCols>, {query_grid, block, staged}, stream, p, tiling);
  const dim3 key_grid(static_cast<unsigned>(tile_slots(p.tokens, p.batch, kTileKeys)), static_cast<unsigned>(p.kv_heads), columns);
  launch(attention_grad_kv_kernel<T, kCols>, {key_grid, block, staged}, stream, p, tiling);
}

template <typename T>
void attention_backward(AttentionBackwardParams<T> p, Stream stream) {
  if (p.tokens == 0 || p.heads == 0) return;
  p.aligned = packs_aligned(p.head_dim, p.q, p.k, p.v, p.out, p.grad_out) && p.q_stride % kPack<T> == 0 &&
              p.kv_stride % kPack<T> == 0;
  if constexpr (sizeof(T) == 2) {
    if (p.head_dim > 128) return launch_attention_backward<T, 256>(p, stream);
    if (p.head_dim > 64) return launch_attention_backward<T, 128>(p, stream);
  }
  launch_attention_backward<T, 64>(p, stream);
}

}  // namespace hybrid::cuda
