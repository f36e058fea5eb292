// Rotary embedding, the append to the paged cache, and both in one.
//
// A thread owns a unit: 16 bytes of the first half of a head's rotated part and their partners in the second, or 16 bytes of what is
// not rotated; of a key or value that is only appended, 16 bytes. Decode launches rope_append alone: a row's query heads, key heads
// and value heads, one after another, are its units.
//   bytes: one read and one write of every element; cosines and sines, shared by the heads of a row, from L1
//   bound: memory; in decode launch
#pragma once
#include "attention/attention_cuda.h"
#include "common/launch.cuh"
#include "common/vector.cuh"

namespace hybrid::cuda {

constexpr int kRopeThreads = 256;

template <typename T>
__device__ __forceinline__ Pack<T> load_angles(const float* p, int64_t count, bool aligned) {
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < kPack<T>; i += kPack<float>) {
    const Pack<float> part = load_pack(p + i, count - i, aligned);
#pragma unroll
    for (int j = 0; j < kPack<float>; ++j) pack.value[i + j] = part.value[j];
  }
  return pack;
}

// How the heads of one position turn.
template <typename T>
struct Rotation {
  const float *cos, *sin;  // [half], of the position
  int64_t half, dim;
  bool aligned;

  static constexpr int64_t pairs(int64_t half) { return ceil_div(half, kPack<T>); }
  // Units of a head.
  static constexpr int64_t units(int64_t half, int64_t dim) { return pairs(half) + ceil_div(dim - 2 * half, kPack<T>); }

  __device__ __forceinline__ Rotation(const float* cosines, const float* sines, int64_t position, int64_t half_, int64_t dim_,
                                      bool aligned_)
      : cos(cosines + position * half_), sin(sines + position * half_), half(half_), dim(dim_), aligned(aligned_) {}

  // One unit of the head at `in`, to the one at `out`.
  __device__ __forceinline__ void turn(const T* in, T* out, int64_t unit) const {
    if (unit >= pairs(half)) {
      const int64_t col = 2 * half + (unit - pairs(half)) * kPack<T>;
      store_words(out + col, load_words(in + col, dim - col, aligned), dim - col, aligned);
      return;
    }
    const int64_t col = unit * kPack<T>, left = half - col;
    const Pack<T> first = load_pack(in + col, left, aligned), second = load_pack(in + half + col, left, aligned);
    const Pack<T> c = load_angles<T>(cos + col, left, aligned), s = load_angles<T>(sin + col, left, aligned);
    Pack<T> turned_first, turned_second;
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      turned_first.value[i] = fmaf(first.value[i], c.value[i], -(second.value[i] * s.value[i]));
      turned_second.value[i] = fmaf(second.value[i], c.value[i], first.value[i] * s.value[i]);
    }
    store_pack(out + col, turned_first, left, aligned);
    store_pack(out + half + col, turned_second, left, aligned);
  }
};

// Where a head's key goes. Its value lies 64 rows behind it.
template <typename T>
__device__ __forceinline__ T* key_slot(T* cache, int64_t slot, int64_t head, int64_t kv_heads, int64_t dim) {
  return cache + ((slot / kKvTile * kv_heads + head) * 2 * kKvTile + slot % kKvTile) * dim;
}

template <typename T>
__global__ void __launch_bounds__(kRopeThreads) rope_kernel(RopeParams<T> p, bool aligned) {
  const int64_t half = p.rotary / 2, units = Rotation<T>::units(half, p.head_dim);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kRopeThreads + threadIdx.x;
  const int64_t row = index / units / p.heads, head = index / units % p.heads;
  if (row >= p.rows) return;
  const Rotation<T> rotation(p.cos, p.sin, p.positions[row], half, p.head_dim, aligned);
  rotation.turn(p.in + row * p.in_stride + head * p.head_dim, p.out + index / units * p.head_dim, index % units);
}

template <typename T>
__global__ void __launch_bounds__(kRopeThreads) kv_append_kernel(KvAppendParams<T> p, bool aligned) {
  const int64_t units = ceil_div(p.head_dim, kPack<T>);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kRopeThreads + threadIdx.x;
  const int64_t head = index / units % p.kv_heads, row = index / units / p.kv_heads;
  if (row >= p.rows) return;
  const int64_t col = index % units * kPack<T>, left = p.head_dim - col, from = head * p.head_dim + col;
  T* key = key_slot(p.cache, p.slots[row], head, p.kv_heads, p.head_dim) + col;
  const uint4 k = load_words(p.k + row * p.k_stride + from, left, aligned);
  const uint4 v = load_words(p.v + row * p.v_stride + from, left, aligned);
  store_words(key, k, left, aligned);
  store_words(key + kKvTile * p.head_dim, v, left, aligned);
}

// What one row is made of.
template <typename T>
struct RopeAppendUnits {
  int turned, copied, all;  // of a head that turns; of a value; of the row

  __host__ __device__ explicit RopeAppendUnits(const RopeAppendParams<T>& p)
      : turned(static_cast<int>(Rotation<T>::units(p.rotary / 2, p.head_dim))),
        copied(static_cast<int>(ceil_div(p.head_dim, kPack<T>))),
        all(static_cast<int>((p.heads + p.kv_heads) * turned + p.kv_heads * copied)) {}
};

template <typename T>
__global__ void __launch_bounds__(kRopeThreads) rope_append_kernel(RopeAppendParams<T> p, bool aligned) {
  const RopeAppendUnits<T> units(p);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kRopeThreads + threadIdx.x, row = index / units.all;
  if (row >= p.rows) return;
  const int unit = static_cast<int>(index % units.all), heads = static_cast<int>(p.heads), kv_heads = static_cast<int>(p.kv_heads);
  const int head = unit / units.turned;  // queries, then keys
  if (head >= heads + kv_heads) {
    const int value = unit - (heads + kv_heads) * units.turned, kv_head = value / units.copied;
    const int64_t col = int64_t{value % units.copied} * kPack<T>, left = p.head_dim - col;
    T* slot = key_slot(p.cache, p.slots[row], kv_head, p.kv_heads, p.head_dim) + kKvTile * p.head_dim + col;
    store_words(slot, load_words(p.v + row * p.v_stride + kv_head * p.head_dim + col, left, aligned), left, aligned);
    return;
  }
  const Rotation<T> rotation(p.cos, p.sin, p.positions[row], p.rotary / 2, p.head_dim, aligned);
  const bool query = head < heads;
  const T* in = query ? p.q + row * p.q_stride + head * p.head_dim : p.k + row * p.k_stride + (head - heads) * p.head_dim;
  T* out = query ? p.out + (row * p.heads + head) * p.head_dim
                 : key_slot(p.cache, p.slots[row], head - heads, p.kv_heads, p.head_dim);
  rotation.turn(in, out, unit % units.turned);
}

inline dim3 rope_grid(int64_t threads) { return dim3(static_cast<unsigned>(ceil_div(threads, kRopeThreads))); }

template <typename T>
void rope(const RopeParams<T>& p, Stream stream) {
  const int64_t half = p.rotary / 2, threads = p.rows * p.heads * Rotation<T>::units(half, p.head_dim);
  if (threads == 0) return;
  const bool aligned = packs_aligned(p.head_dim, p.in, p.out) && packs_aligned(p.in_stride, p.in) && packs_aligned(half, p.in) &&
                       packs_aligned(half, p.cos, p.sin);
  launch(rope_kernel<T>, {rope_grid(threads), dim3(kRopeThreads)}, stream, p, aligned);
}

template <typename T>
void kv_append(const KvAppendParams<T>& p, Stream stream) {
  const int64_t threads = p.rows * p.kv_heads * ceil_div(p.head_dim, kPack<T>);
  if (threads == 0) return;
  const bool aligned = packs_aligned(p.head_dim, p.cache) && packs_aligned(p.k_stride, p.k) && packs_aligned(p.v_stride, p.v);
  launch(kv_append_kernel<T>, {rope_grid(threads), dim3(kRopeThreads)}, stream, p, aligned);
}

template <typename T>
void rope_append(const RopeAppendParams<T>& p, Stream stream) {
  const int64_t half = p.rotary / 2, threads = p.rows * RopeAppendUnits<T>(p).all;
  if (threads == 0) return;
  const bool aligned = packs_aligned(p.head_dim, p.out, p.cache) && packs_aligned(p.q_stride, p.q) &&
                       packs_aligned(p.k_stride, p.k) && packs_aligned(p.v_stride, p.v) && packs_aligned(half, p.q) &&
                       packs_aligned(half, p.cos, p.sin);
  launch(rope_append_kernel<T>, {rope_grid(threads), dim3(kRopeThreads)}, stream, p, aligned);
}

}  // namespace hybrid::cuda
