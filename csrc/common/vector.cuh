// Runs of elements in packs of 16 bytes: one memory instruction where the address allows it.
#pragma once
#include "common/numeric.cuh"

namespace hybrid::cuda {

template <typename T>
inline constexpr int kPack = static_cast<int>(16 / sizeof(T));  // elements of a pack

// A pack in registers. Loops over it are unrolled: its indices must be constants for it to stay there.
template <typename T>
struct Pack {
  float value[kPack<T>];
};

// Whether rows of this many elements, the first at each of the pointers, all begin at a multiple of 16 bytes. A null pointer is
// never read.
template <typename T, typename... Others>
inline bool packs_aligned(int64_t stride, const T* first, const Others*... others) {
  const bool aligned = first == nullptr || (reinterpret_cast<uintptr_t>(first) % 16 == 0 && stride % kPack<T> == 0);
  if constexpr (sizeof...(others) > 0) return aligned && packs_aligned(stride, others...);
  return aligned;
}

template <typename T>
__device__ __forceinline__ T element(const uint4& raw, int i) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(words[i]);
  } else {
    return {static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)))};
  }
}

__device__ __forceinline__ unsigned word_of(float value) { return __float_as_uint(value); }
template <typename T>
__device__ __forceinline__ unsigned word_of(T low, T high) {
  return static_cast<unsigned>(low.bits) | static_cast<unsigned>(high.bits) << 16;
}

__device__ __forceinline__ uint4 load_16(const void* p) {
#ifndef __CUDACC__
  simt::require_alignment(p, 16, simt::Site::current());
#endif
  return *static_cast<const uint4*>(p);
}
template <typename Word>
__device__ __forceinline__ Word load_as(const void* p) {
#ifndef __CUDACC__
  simt::require_alignment(p, sizeof(Word), simt::Site::current());
#endif
  Word word;
  memcpy(&word, p, sizeof(Word));
  return word;
}
__device__ __forceinline__ unsigned load_4(const void* p) { return load_as<unsigned>(p); }
__device__ __forceinline__ void store_4(void* p, unsigned word) {
#ifndef __CUDACC__
  simt::require_alignment(p, 4, simt::Site::current());
#endif
  memcpy(p, &word, 4);
}

// The first `count` elements at p, zeros after them. One 16-byte load where the pack is full and `aligned` says that it may.
template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* p, int64_t count, bool aligned) {
  Pack<T> pack;
  if (aligned && count >= kPack<T>) {
    const uint4 raw = load_16(p);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) pack.value[i] = to_float(element<T>(raw, i));
  } else {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) pack.value[i] = i < count ? to_float(p[i]) : 0.0f;
  }
  return pack;
}

// The same, as they are stored.
template <typename T>
__device__ __forceinline__ uint4 load_words(const T* p, int64_t count, bool aligned) {
  if (aligned && count >= kPack<T>) return load_16(p);
  T e[kPack<T>];
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) e[i] = i < count ? p[i] : T{};
  if constexpr (sizeof(T) == 4) {
    return make_uint4(word_of(e[0]), word_of(e[1]), word_of(e[2]), word_of(e[3]));
  } else {
    return make_uint4(word_of(e[0], e[1]), word_of(e[2], e[3]), word_of(e[4], e[5]), word_of(e[6], e[7]));
  }
}

template <typename T>
__device__ __forceinline__ uint4 rounded_words(const Pack<T>& pack) {
  if constexpr (sizeof(T) == 4) {
    return make_uint4(word_of(pack.value[0]), word_of(pack.value[1]), word_of(pack.value[2]), word_of(pack.value[3]));
  } else {
    T e[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) e[i] = round_to<T>(pack.value[i]);
    return make_uint4(word_of(e[0], e[1]), word_of(e[2], e[3]), word_of(e[4], e[5]), word_of(e[6], e[7]));
  }
}

// Writes the first `count` elements, each rounded once.
template <typename T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T>& pack, int64_t count, bool aligned) {
  if (aligned && count >= kPack<T>) {
    st_global_16(p, rounded_words(pack));
  } else {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      if (i < count) p[i] = round_to<T>(pack.value[i]);
    }
  }
}

// Writes the first `count` elements of words as load_words gave them.
template <typename T>
__device__ __forceinline__ void store_words(T* p, const uint4& words, int64_t count, bool aligned) {
  if (aligned && count >= kPack<T>) {
    st_global_16(p, words);
  } else {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      if (i < count) p[i] = element<T>(words, i);
    }
  }
}

}  // namespace hybrid::cuda
