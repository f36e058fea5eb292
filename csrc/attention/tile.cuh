// What attention does with a tile: one warp, 16 rows times 64 keys.
//
// Scores, their softmax and the weights' product with the values take the same order in every kernel, so that a row has the same
// bits in prefill, training and decode: the products of a score in steps of 32 columns; a softmax relative to the tile's own maximum;
// the products with the values in steps of 16 keys. Tiles begin at absolute positions and are joined in order, four to a chunk of
// 256 keys and then chunk by chunk (RowState).
//   16-bit types: mma m16n8k16. Scores stay in registers from the products to the weights.
//   fp32: multiply-adds in the order of columns and of keys. Scores pass through shared memory.
// The rows and keys come from `Rows` and `Keys`: load(row, col) gives 16 bytes, zeros beyond the edges; Keys::kInFlight such loads are
// worth having under way at once.
#pragma once
#include "attention/query_tile.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace hybrid::cuda {

constexpr int kWarpRows = 16;                  // of an mma tile
constexpr int kSliceCols = 32;                 // columns of a slice of the values
constexpr int kTileStride = kTileKeys + 4;     // floats between rows in shared memory: fewer bank conflicts

using AttentionTile = float[kWarpRows][kTileStride];

// A lane's share of a 16 x 32 slice: element i is slice[i / 4][i % 4].
constexpr int kSliceFloats = kWarpRows * kSliceCols / kWarpSize;
using Slice = float[kSliceFloats / 4][4];

// The scores of a warp and, in place, the weights. A lane owns some keys of kRows rows; kLanes lanes, neighbours, share a row.
template <typename T>
struct ScoreTile {
  static constexpr int kRows = 2, kKeys = 16, kLanes = 4;
  struct Shared {};  // needs none

  float sum[kTileKeys / 8][4];
  uint32_t operand[kTileKeys / 16][4];  // the weights of every 16 keys as the left operand of mma

  __device__ __forceinline__ explicit ScoreTile(Shared&) {}
  static __device__ __forceinline__ int row(int i) { return static_cast<int>(threadIdx.x) / 4 + 8 * i; }
  static __device__ __forceinline__ int key(int k) { return 8 * (k / 2) + 2 * (static_cast<int>(threadIdx.x) % 4) + k % 2; }
  __device__ __forceinline__ float& at(int i, int k) { return sum[k / 2][2 * i + k % 2]; }

  // Lane 4g + t loads 8 elements of rows g and g + 8 and of keys g, g + 8, ... at columns 8t, 8t + 32, ...: two steps of mma,
  // whose 16 products are those of 4 lanes times 4 elements. That they are not neighbours is no matter to a sum.
  template <typename Rows, typename Keys>
  __device__ __forceinline__ void multiply(const Rows& rows, const Keys& keys, int64_t dim) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < kTileKeys / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[j][i] = 0.0f;
    }
#pragma unroll 1
    for (int64_t base = 0; base < dim; base += 32) {
      const int64_t col = base + 8 * t;
      const uint4 upper = rows.load(g, col), lower = rows.load(g + 8, col);
#pragma unroll
      for (int first = 0; first < kTileKeys / 8; first += Keys::kInFlight) {
        uint4 key[Keys::kInFlight];
#pragma unroll
        for (int j = 0; j < Keys::kInFlight; ++j) key[j] = keys.load(8 * (first + j) + g, col);
#pragma unroll
        for (int j = 0; j < Keys::kInFlight; ++j) {
          mma_m16n8k16<T>(sum[first + j], {upper.x, lower.x, upper.y, lower.y}, {key[j].x, key[j].y});
          mma_m16n8k16<T>(sum[first + j], {upper.z, lower.z, upper.w, lower.w}, {key[j].z, key[j].w});
        }
      }
    }
  }

  // Every lane has the weights that it multiplies; two to a register from here on.
  __device__ __forceinline__ void share() {
#pragma unroll
    for (int j = 0; j < kTileKeys / 8; ++j) {
      operand[j / 2][j % 2 * 2] = word_of(round_to<T>(sum[j][0]), round_to<T>(sum[j][1]));
      operand[j / 2][j % 2 * 2 + 1] = word_of(round_to<T>(sum[j][2]), round_to<T>(sum[j][3]));
    }
  }
};

template <>
struct ScoreTile<float> {
  static constexpr int kRows = 1, kKeys = kTileKeys / 2, kLanes = 2;
  struct Shared {
    alignas(16) AttentionTile tile;
  };

  AttentionTile& tile;

  __device__ __forceinline__ explicit ScoreTile(Shared& shared) : tile(shared.tile) {}
  static __device__ __forceinline__ int row(int) { return threadIdx.x / 2; }
  static __device__ __forceinline__ int key(int k) { return static_cast<int>(threadIdx.x) % 2 * kKeys + k; }
  __device__ __forceinline__ float& at(int i, int k) { return tile[row(i)][key(k)]; }

  // A lane owns two keys and all rows, whose elements are the same for all lanes.
  template <typename Rows, typename Keys>
  __device__ __forceinline__ void multiply(const Rows& rows, const Keys& keys, int64_t dim) {
    const int lane = threadIdx.x;
    float sum[2][kWarpRows] = {};
#pragma unroll 1
    for (int64_t col = 0; col < dim; col += kPack<float>) {
      const uint4 key0 = keys.load(lane, col), key1 = keys.load(lane + kWarpSize, col);
#pragma unroll
      for (int row = 0; row < kWarpRows; ++row) {
        const uint4 q = rows.load(row, col);
#pragma unroll
        for (int i = 0; i < kPack<float>; ++i) {
          sum[0][row] = fmaf(element<float>(q, i), element<float>(key0, i), sum[0][row]);
          sum[1][row] = fmaf(element<float>(q, i), element<float>(key1, i), sum[1][row]);
        }
      }
    }
    __syncwarp();  // the weights that were here are used
#pragma unroll
    for (int row = 0; row < kWarpRows; ++row) {
      tile[row][lane] = sum[0][row];
      tile[row][lane + kWarpSize] = sum[1][row];
    }
    __syncwarp();
  }

  __device__ __forceinline__ void share() { __syncwarp(); }
};

// slice += weights [16, 64] times the values' columns col .. col + 32. A lane owns column `lane` of all rows.
template <typename Values>
__device__ __forceinline__ void add_values(const ScoreTile<float>& weights, const Values& values, int64_t col,
                                           Slice& slice) {
#pragma unroll 4
  for (int key = 0; key < kTileKeys; ++key) {
    const float value = values.value(key, col + threadIdx.x);
#pragma unroll
    for (int row = 0; row < kWarpRows; ++row) {
      slice[row / 4][row % 4] = fmaf(weights.tile[row][key], value, slice[row / 4][row % 4]);
    }
  }
}

// ---- softmax -----------------------------------------------------------------------------------------------------------------

// What a lane must know of its rows.
template <typename T>
struct RowPlaces {
  int position[ScoreTile<T>::kRows];  // -1: no row
  float slope[ScoreTile<T>::kRows];   // of ALiBi, or 0

  template <typename PositionOf>
  __device__ __forceinline__ RowPlaces(const QueryTile& tile, int first_row, const float* alibi_slopes,
                                       const PositionOf& position_of) {
#pragma unroll
    for (int i = 0; i < ScoreTile<T>::kRows; ++i) {
      const int row = first_row + ScoreTile<T>::row(i);
      const bool any = row < tile.rows;
      position[i] = any ? position_of(row) : -1;
      slope[i] = any && alibi_slopes != nullptr ? alibi_slopes[tile.head_of(row)] : 0.0f;
    }
  }
};

// How scores are made of products, and which of them count.
struct Scoring {
  float scale;
  int64_t window;  // keys visible to a query, itself included; 0 means all

  __device__ __forceinline__ float score(float product, float slope, int away) const {  // away: key - query
    return fmaf(slope, static_cast<float>(away), product * scale);
  }
  // The keys of a tile that a query at place `at`, counted from the tile's first key, sees: low .. high.
  __device__ __forceinline__ int low(int64_t at) const {
    return window > 0 ? static_cast<int>(larger(smaller(at - window + 1, kTileKeys), 0)) : 0;
  }
  __device__ __forceinline__ int high(int64_t at) const { return static_cast<int>(smaller(at + 1, kTileKeys)); }
};

// What multiplies sums that were taken relative to `max` when they join others under `top`.
__device__ __forceinline__ float rescale(float max, float top) { return max > -INFINITY ? expf(max - top) : 0.0f; }

// The softmax of a row over the keys so far: sums are relative to `max`; `mass` is the sum of the weights. join() takes in more keys and
// leaves the factors of the earlier sums and of theirs: sum = fma(sum, old, theirs * fresh). Keys that the row does not see change
// nothing.
struct RowState {
  float max = -INFINITY, mass = 0.0f;

  struct Factors {
    float old, fresh;
  };
  __device__ __forceinline__ Factors join(const RowState& more) {
    const float top = fmaxf(max, more.max);
    const Factors factors{rescale(max, top), rescale(more.max, top)};
    mass = fmaf(mass, factors.old, more.mass * factors.fresh);
    max = top;
    return factors;
  }
};

// Turns the scores of keys first_key .. first_key + 64 into weights exp(score - max), rounded as the product with the values takes them,
// and 0 for keys that the row does not see. Every lane of a row gets its state.
template <typename T>
__device__ __forceinline__ void softmax_tile(ScoreTile<T>& scores, const RowPlaces<T>& rows, const Scoring& scoring,
                                             int64_t first_key, RowState (&state)[ScoreTile<T>::kRows]) {
  using Tile = ScoreTile<T>;
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    const int at = static_cast<int>(rows.position[i] - first_key), low = scoring.low(at), high = scoring.high(at);
    float top = -INFINITY;
#pragma unroll
    for (int k = 0; k < Tile::kKeys; ++k) {
      const int key = Tile::key(k);
      const float score = scoring.score(scores.at(i, k), rows.slope[i], key - at);
      scores.at(i, k) = key >= low && key < high ? score : -INFINITY;
      top = fmaxf(top, scores.at(i, k));
    }
#pragma unroll
    for (int distance = 1; distance < Tile::kLanes; distance *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, distance));
    float mass = 0.0f;
#pragma unroll
    for (int k = 0; k < Tile::kKeys; ++k) {
      const float weight = rounded<T>(top > -INFINITY ? expf(scores.at(i, k) - top) : 0.0f);
      scores.at(i, k) = weight;
      mass += weight;
    }
#pragma unroll
    for (int distance = 1; distance < Tile::kLanes; distance *= 2) mass += __shfl_xor_sync(kAllLanes, mass, distance);
    state[i] = {top, mass};
  }
  scores.share();
}

}  // namespace hybrid::cuda
