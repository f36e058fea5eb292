// W + s B A: into other storage, or in place with a record that restores every bit.
//
// A warp owns kTileRows rows x 32 packs of 16 bytes; a block is 4 warps, one above another. A thread holds kTileRows x one pack of
// sums in registers, reads a pack of A once a rank for all its rows (three of a block's four warps find it in L1) and the
// numbers of B, the same for the whole warp, from L1.
//   bytes: 2 rows cols sizeof(T), 1 more for the residual, in place; A again once in 4 kTileRows rows, from L2
//   flops: 2 rank rows cols; bound: memory up to rank 16 or so in bf16 (8 flops a byte), fp32 multiply-adds beyond
// Counting the escapes first costs one more reading of W and the multiply-adds again; it makes their order and the size of their
// arrays independent of timing.
#pragma once
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "lora/lora_cuda.h"

namespace hybrid::cuda {

// One thread's part of the weight: kTileRows rows of one pack of columns. Rows beyond the end count as empty.
template <typename T>
struct LoraTile {
  int64_t row, col, left;
  int rows;

  __device__ __forceinline__ explicit LoraTile(const LoraParams& p) {
    constexpr int kWidth = kWarpSize * kPack<T>;
    const auto tiles_across = static_cast<unsigned>(ceil_div(p.cols, kWidth));
    row = static_cast<int64_t>(blockIdx.x / tiles_across * kLoraWarps + threadIdx.y) * kTileRows;
    col = static_cast<int64_t>(blockIdx.x % tiles_across) * kWidth + threadIdx.x * kPack<T>;
    left = p.cols - col;
    rows = left > 0 ? static_cast<int>(smaller(kTileRows, p.rows - row)) : 0;  // negative below the last row: none
  }
};

// The split that a row falls in, and the first row after it. The loop is unrolled: an index that is known only at run time would
// put the array into local memory.
struct LoraSplit {
  int64_t index = 0, end;
  __device__ __forceinline__ LoraSplit(const LoraParams& p, int64_t row) : end(p.rows) {
#pragma unroll
    for (int i = 0; i < kMaxLoraSplits; ++i) {
      if (i < p.splits && row >= p.split_end[i]) ++index;
    }
#pragma unroll
    for (int i = 0; i < kMaxLoraSplits; ++i) {
      if (i == index) end = p.split_end[i];
    }
  }
};

// The delta of a thread's tile. Rows of one split are computed together, sharing their loads of A.
template <typename T>
struct LoraDelta {
  float value[kTileRows][kPack<T>];

  __device__ __forceinline__ LoraDelta(const LoraParams& p, const LoraTile<T>& tile, bool aligned) {
#pragma unroll
    for (int i = 0; i < kTileRows; ++i) {
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) value[i][j] = 0.0f;
    }
    for (int first = 0; first < tile.rows;) {
      const LoraSplit split(p, tile.row + first);
      const int end = static_cast<int>(smaller(split.end - tile.row, tile.rows));
      add_split(p, tile, split.index, first, end, aligned);
      first = end;
    }
#pragma unroll
    for (int i = 0; i < kTileRows; ++i) {
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) value[i][j] *= p.scale;
    }
  }

 private:
  // Rows [first, end) of the tile.
  __device__ __forceinline__ void add_split(const LoraParams& p, const LoraTile<T>& tile, int64_t split, int first,
                                            int end, bool aligned) {
    const float* a = p.a + split * p.rank * p.cols + tile.col;
    const float* b = p.b + tile.row * p.rank;
    for (int r = 0; r < p.rank; ++r) {
      float factor[kPack<T>];
      load_factor(a + r * p.cols, tile.left, aligned, factor);
#pragma unroll
      for (int i = 0; i < kTileRows; ++i) {
        if (i < first || i >= end) continue;
        const float weight = b[i * p.rank + r];
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j) value[i][j] = fmaf(weight, factor[j], value[i][j]);
      }
    }
  }

  // As many floats as the weight has elements in a pack: one or two packs of their own.
  __device__ __forceinline__ static void load_factor(const float* a, int64_t left, bool aligned,
                                                     float (&factor)[kPack<T>]) {
#pragma unroll
    for (int k = 0; k < kPack<T>; k += kPack<float>) {
      const Pack<float> part = load_pack(a + k, left - k, aligned);
#pragma unroll
      for (int j = 0; j < kPack<float>; ++j) factor[k + j] = part.value[j];
    }
  }
};

// Numbers of a format as integers in the order of their values: neighbours differ by one, -0 comes just before +0.
__device__ __forceinline__ int64_t ordered(float x) {
  const auto bits = static_cast<int32_t>(__float_as_uint(x));
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}
template <typename T>
__device__ __forceinline__ int64_t ordered(T x) {
  const auto bits = static_cast<int16_t>(x.bits);
  return bits < 0 ? bits ^ 0x7fff : bits;
}
template <typename T>
__device__ __forceinline__ T from_ordered(int64_t value) {
  if constexpr (sizeof(T) == 4) {
    const auto bits = static_cast<int32_t>(value);
    return __uint_as_float(static_cast<unsigned>(bits < 0 ? bits ^ 0x7fffffff : bits));
  } else {
    return {static_cast<uint16_t>(value < 0 ? value ^ 0x7fff : value)};
  }
}

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < INFINITY; }

// As many bytes as a pack has elements, moved as words where the address allows it.
template <typename T>
struct Bytes {
  int8_t value[kPack<T>];
};
template <typename T>
__device__ __forceinline__ Bytes<T> load_bytes(const int8_t* p, int64_t count, bool aligned) {
  Bytes<T> bytes;
  if (aligned && count >= kPack<T>) {
#pragma unroll
    for (int i = 0; i < kPack<T>; i += 4) {
      const unsigned word = load_4(p + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) bytes.value[i + j] = static_cast<int8_t>(word >> 8 * j & 0xff);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) bytes.value[i] = i < count ? p[i] : int8_t{0};
  }
  return bytes;
}
template <typename T>
__device__ __forceinline__ void store_bytes(int8_t* p, const Bytes<T>& bytes, int64_t count, bool aligned) {
  if (aligned && count >= kPack<T>) {
#pragma unroll
    for (int i = 0; i < kPack<T>; i += 4) {
      unsigned word = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) word |= static_cast<unsigned>(static_cast<uint8_t>(bytes.value[i + j])) << 8 * j;
      store_4(p + i, word);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      if (i < count) p[i] = bytes.value[i];
    }
  }
}

// What merging one weight leaves to record.
struct LoraResidual {
  int8_t units;
  bool escapes;
};
template <typename T>
__device__ __forceinline__ LoraResidual residual_of(float base, float merged, float delta) {
  const float near = rounded<T>(merged - delta);
  if (!is_finite(base) || !is_finite(merged) || !is_finite(near)) return {0, true};
  const int64_t units = ordered(round_to<T>(base)) - ordered(round_to<T>(near));
  if (units < -127 || units > 127) return {0, true};
  return {static_cast<int8_t>(units), false};
}

template <typename T>
__global__ void __launch_bounds__(kWarpSize* kLoraWarps)
    lora_merge_kernel(LoraParams p, const T* weight, T* merged, bool aligned) {
  const LoraTile<T> tile(p);
  const LoraDelta<T> delta(p, tile, aligned);
#pragma unroll
  for (int i = 0; i < kTileRows; ++i) {
    if (i >= tile.rows) break;
    const int64_t at = (tile.row + i) * p.cols + tile.col;
    Pack<T> w = load_pack(weight + at, tile.left, aligned);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) w.value[j] += delta.value[i][j];
    store_pack(merged + at, w, tile.left, aligned);
  }
}

// The thread's weights that only an escape restores.
template <typename T>
__device__ __forceinline__ int count_escapes(const LoraParams& p, const LoraTile<T>& tile, const LoraDelta<T>& delta,
                                             const T* weight, bool aligned) {
  int escapes = 0;
#pragma unroll
  for (int i = 0; i < kTileRows; ++i) {
    if (i >= tile.rows) break;
    const Pack<T> base = load_pack(weight + (tile.row + i) * p.cols + tile.col, tile.left, aligned);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      const float merged = rounded<T>(base.value[j] + delta.value[i][j]);
      escapes += j < tile.left && residual_of<T>(base.value[j], merged, delta.value[i][j]).escapes;
    }
  }
  return escapes;
}

// counts[block] = its escapes.
template <typename T>
__global__ void __launch_bounds__(kWarpSize* kLoraWarps)
    lora_count_kernel(LoraParams p, const T* weight, int64_t* counts, bool aligned) {
  struct Counts {
    int of_warp[kLoraWarps];
  };
  Counts& counted = shared_memory<Counts>();
  const LoraTile<T> tile(p);
  const LoraDelta<T> delta(p, tile, aligned);
  const int escapes = reduce_warp(count_escapes(p, tile, delta, weight, aligned));
  if (threadIdx.x == 0) counted.of_warp[threadIdx.y] = escapes;
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    int64_t total = 0;
    for (int warp = 0; warp < kLoraWarps; ++warp) total += counted.of_warp[warp];
    counts[blockIdx.x] = total;
  }
}

// In place: offsets[i] becomes the sum of the counts before i, offsets[tiles] the sum of all. One warp, 32 counts at a time.
__global__ void __launch_bounds__(kWarpSize) lora_offsets_kernel(int64_t* offsets, int64_t tiles) {
  int64_t before = 0;
  for (int64_t base = 0; base < tiles; base += kWarpSize) {
    const int64_t i = base + threadIdx.x;
    const int64_t count = i < tiles ? offsets[i] : 0;
    int64_t sum = count;  // of the lanes up to this one
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const int64_t lower = __shfl_up_sync(kAllLanes, sum, distance);
      if (threadIdx.x >= static_cast<unsigned>(distance)) sum += lower;
    }
    if (i < tiles) offsets[i] = before + sum - count;
    before += __shfl_sync(kAllLanes, sum, kWarpSize - 1);
  }
  if (threadIdx.x == 0) offsets[tiles] = before;
}

template <typename T>
__global__ void __launch_bounds__(kWarpSize* kLoraWarps)
    lora_merge_in_place_kernel(LoraParams p, T* weight, int8_t* residuals, const int64_t* offsets,
                               LoraEscapes<T> escapes, bool aligned) {
  struct Counts {
    int of_warp[kLoraWarps];
  };
  Counts& counted = shared_memory<Counts>();
  const LoraTile<T> tile(p);
  const LoraDelta<T> delta(p, tile, aligned);
  const int mine = count_escapes<T>(p, tile, delta, weight, aligned);
  int up_to_mine = mine;  // escapes of the lanes up to this one
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int lower = __shfl_up_sync(kAllLanes, up_to_mine, distance);
    if (threadIdx.x >= static_cast<unsigned>(distance)) up_to_mine += lower;
  }
  if (threadIdx.x == kWarpSize - 1) counted.of_warp[threadIdx.y] = up_to_mine;
  __syncthreads();
  int64_t slot = offsets[blockIdx.x] + up_to_mine - mine;
  for (unsigned warp = 0; warp < threadIdx.y; ++warp) slot += counted.of_warp[warp];

#pragma unroll
  for (int i = 0; i < kTileRows; ++i) {
    if (i >= tile.rows) break;
    const int64_t at = (tile.row + i) * p.cols + tile.col;
    Pack<T> w = load_pack(weight + at, tile.left, aligned);
    Bytes<T> units;
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      const float base = w.value[j];
      w.value[j] = rounded<T>(base + delta.value[i][j]);
      const LoraResidual residual = residual_of<T>(base, w.value[j], delta.value[i][j]);
      units.value[j] = residual.units;
      if (j >= tile.left || !residual.escapes) continue;
      escapes.index[slot] = at + j;
      escapes.value[slot] = weight[at + j];  // not through float, which would not keep the bits of a NaN
      ++slot;
    }
    store_pack(weight + at, w, tile.left, aligned);
    store_bytes(residuals + at, units, tile.left, aligned);
  }
}

template <typename T>
__global__ void __launch_bounds__(kWarpSize* kLoraWarps)
    lora_unmerge_kernel(LoraParams p, T* weight, const int8_t* residuals, bool aligned) {
  const LoraTile<T> tile(p);
  const LoraDelta<T> delta(p, tile, aligned);
#pragma unroll
  for (int i = 0; i < kTileRows; ++i) {
    if (i >= tile.rows) break;
    const int64_t at = (tile.row + i) * p.cols + tile.col;
    Pack<T> w = load_pack(weight + at, tile.left, aligned);
    const Bytes<T> units = load_bytes<T>(residuals + at, tile.left, aligned);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      const T near = round_to<T>(w.value[j] - delta.value[i][j]);
      w.value[j] = to_float(from_ordered<T>(ordered(near) + units.value[j]));
    }
    store_pack(weight + at, w, tile.left, aligned);
  }
}

// weight[index[e]] = value[e].
template <typename T>
__global__ void __launch_bounds__(256) lora_restore_kernel(T* weight, LoraEscapes<T> escapes, int64_t count) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e < count) weight[escapes.index[e]] = escapes.value[e];
}

template <typename T>
LaunchShape lora_shape(const LoraParams& p) {
  return {dim3(static_cast<unsigned>(lora_tiles(p.rows, p.cols, sizeof(T)))), dim3(kWarpSize, kLoraWarps)};
}

// residual: nullptr where there is none.
template <typename T>
bool lora_aligned(const LoraParams& p, const T* weight, const T* merged, const int8_t* residual = nullptr) {
  return packs_aligned(p.cols, weight, merged, p.a) && reinterpret_cast<uintptr_t>(residual) % 4 == 0;
}

template <typename T>
void lora_merge(const LoraParams& p, const T* weight, T* merged, Stream stream) {
  if (p.rows == 0 || p.cols == 0) return;
  launch(lora_merge_kernel<T>, lora_shape<T>(p), stream, p, weight, merged, lora_aligned<T>(p, weight, merged));
}

template <typename T>
void lora_count_escapes(const LoraParams& p, const T* weight, int64_t* offsets, Stream stream) {
  const int64_t tiles = lora_tiles(p.rows, p.cols, sizeof(T));
  if (tiles > 0) {
    launch(lora_count_kernel<T>, lora_shape<T>(p), stream, p, weight, offsets, lora_aligned<T>(p, weight, weight));
  }
  launch(lora_offsets_kernel, {dim3(1), dim3(kWarpSize)}, stream, offsets, tiles);
}

template <typename T>
void lora_merge_in_place(const LoraParams& p, T* weight, int8_t* residual, const int64_t* offsets,
                         const LoraEscapes<T>& escapes, Stream stream) {
  if (p.rows == 0 || p.cols == 0) return;
  launch(lora_merge_in_place_kernel<T>, lora_shape<T>(p), stream, p, weight, residual, offsets, escapes,
         lora_aligned<T>(p, weight, weight, residual));
}

template <typename T>
void lora_unmerge_in_place(const LoraParams& p, T* weight, const int8_t* residual, const LoraEscapes<T>& escapes,
                           int64_t escape_count, Stream stream) {
  if (p.rows > 0 && p.cols > 0) {
    launch(lora_unmerge_kernel<T>, lora_shape<T>(p), stream, p, weight, residual,
           lora_aligned<T>(p, weight, weight, residual));
  }
  if (escape_count > 0) {
    launch(lora_restore_kernel<T>, {dim3(static_cast<unsigned>(ceil_div(escape_count, 256))), dim3(256)}, stream,
           weight, escapes, escape_count);
  }
}

}  // namespace hybrid::cuda
