// Rotary embedding, and the append to the paged cache.
//
// rope: a thread owns 16 bytes of the first half of a head's rotated part and their partners in the second, or 16 bytes of what is
// not rotated. kv_append: a thread owns 16 bytes of a key and of its value.
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

template <typename T>
__global__ void __launch_bounds__(kRopeThreads) rope_kernel(RopeParams<T> p, bool aligned) {
  const int64_t half = p.rotary / 2, pairs = ceil_div(half, kPack<T>);
  const int64_t units = pairs + ceil_div(p.head_dim - p.rotary, kPack<T>);  // of a head
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kRopeThreads + threadIdx.x;
  const int64_t head = index / units, unit = index % units;
  if (head >= p.rows * p.heads) return;
  const T* in = p.in + head * p.head_dim;
  T* out = p.out + head * p.head_dim;
  if (unit >= pairs) {
    const int64_t col = p.rotary + (unit - pairs) * kPack<T>;
    store_words(out + col, load_words(in + col, p.head_dim - col, aligned), p.head_dim - col, aligned);
    return;
  }
  const int64_t col = unit * kPack<T>, left = half - col;
  const int64_t angle = p.positions[head / p.heads] * half + col;
  const Pack<T> first = load_pack(in + col, left, aligned), second = load_pack(in + half + col, left, aligned);
  const Pack<T> cos = load_angles<T>(p.cos + angle, left, aligned), sin = load_angles<T>(p.sin + angle, left, aligned);
  Pack<T> turned_first, turned_second;
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    turned_first.value[i] = fmaf(first.value[i], cos.value[i], -(second.value[i] * sin.value[i]));
    turned_second.value[i] = fmaf(second.value[i], cos.value[i], first.value[i] * sin.value[i]);
  }
  store_pack(out + col, turned_first, left, aligned);
  store_pack(out + half + col, turned_second, left, aligned);
}

template <typename T>
__global__ void __launch_bounds__(kRopeThreads) kv_append_kernel(KvAppendParams<T> p, bool aligned) {
  const int64_t units = ceil_div(p.head_dim, kPack<T>);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kRopeThreads + threadIdx.x;
  const int64_t head = index / units % p.kv_heads, row = index / units / p.kv_heads;
  if (row >= p.rows) return;
  const int64_t col = index % units * kPack<T>, left = p.head_dim - col;
  const int64_t from = (row * p.kv_heads + head) * p.head_dim + col;
  const int64_t slot = p.slots[row];
  T* key = p.cache + ((slot / kKvTile * p.kv_heads + head) * 2 * kKvTile + slot % kKvTile) * p.head_dim + col;
  const uint4 k = load_words(p.k + from, left, aligned), v = load_words(p.v + from, left, aligned);
  store_words(key, k, left, aligned);
  store_words(key + kKvTile * p.head_dim, v, left, aligned);
}

inline dim3 rope_grid(int64_t threads) { return dim3(static_cast<unsigned>(ceil_div(threads, kRopeThreads))); }

template <typename T>
void rope(const RopeParams<T>& p, Stream stream) {
  const int64_t half = p.rotary / 2;
  const int64_t threads = p.rows * p.heads * (ceil_div(half, kPack<T>) + ceil_div(p.head_dim - p.rotary, kPack<T>));
  if (threads == 0) return;
  const bool aligned = packs_aligned(p.head_dim, p.in, p.out) && packs_aligned(half, p.in) && packs_aligned(half, p.cos, p.sin);
  launch(rope_kernel<T>, {rope_grid(threads), dim3(kRopeThreads)}, stream, p, aligned);
}

template <typename T>
void kv_append(const KvAppendParams<T>& p, Stream stream) {
  const int64_t threads = p.rows * p.kv_heads * ceil_div(p.head_dim, kPack<T>);
  if (threads == 0) return;
  const bool aligned = packs_aligned(p.head_dim, p.k, p.v, p.cache);
  launch(kv_append_kernel<T>, {rope_grid(threads), dim3(kRopeThreads)}, stream, p, aligned);
}

}  // namespace hybrid::cuda
