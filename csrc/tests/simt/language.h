// CUDA's dialect for g++: what a .cuh file uses of it, no more. Kernels include common/device.cuh, which picks this or CUDA.
//
// Shared memory has no keyword here: kernels take it from common/shared.cuh, so that it can be poisoned and fenced.
#pragma once
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) [[gnu::may_alias]] uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) [[gnu::may_alias]] float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline uint3 threadIdx, blockIdx;  // of the thread whose turn it is
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace simt {

using Site = std::source_location;

enum class Collective { kBlock, kWarp, kShuffle, kVote, kMatrix };

// What a lane gives to a warp-wide operation.
struct Packet {
  uint64_t word[4];
};

// Gives `mine` and waits for the lanes of the mask; returns the packets of the warp's 32 lanes, to be read before the next but one
// exchange. Orders memory among them only for Collective::kWarp, as CUDA does.
const Packet* exchange(Collective kind, unsigned mask, const Packet& mine, const Site& site);
void block_barrier(const Site& site);
int lane_index();

// Memory of the block, full of NaN at first and fenced for AddressSanitizer. The same key gives the same memory.
void* static_shared(const void* key, size_t bytes, size_t alignment, const Site& site);
void* dynamic_shared(const Site& site);

// A copy that may happen at any time until the group it is committed to is waited for: what the destination held is gone at once,
// and the copy is there after the wait, not earlier.
void copy_later(void* shared, const void* global, int bytes, int zero_bytes);
void commit_copies();
void wait_for_copies(int groups_left);

// Throws simt::Error unless the address is a multiple of bytes, as the hardware does.
void require_alignment(const void* address, size_t bytes, const Site& site);
void require(bool good, const char* what, const Site& site);

template <typename T>
Packet packet(T value) {
  static_assert(sizeof(T) <= sizeof(Packet));
  Packet out{};
  std::memcpy(&out, &value, sizeof(T));
  return out;
}
template <typename T>
T unpack(const Packet& in) {
  T value;
  std::memcpy(&value, &in, sizeof(T));
  return value;
}

template <typename T>
T shuffle(unsigned mask, T value, int source, const Site& site) {
  const Packet* lanes = exchange(Collective::kShuffle, mask, packet(value), site);
  require(mask >> source & 1, "shuffle from a lane outside the mask", site);
  return unpack<T>(lanes[source]);
}

}  // namespace simt

inline void __syncthreads(simt::Site site = simt::Site::current()) { simt::block_barrier(site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Site site = simt::Site::current()) {
  simt::exchange(simt::Collective::kWarp, mask, {}, site);
}

// Shuffles within segments of `width` lanes. A source beyond the segment leaves the lane's own value.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, simt::Site site = simt::Site::current()) {
  return simt::shuffle(mask, value, (simt::lane_index() & ~(width - 1)) | (source & (width - 1)), site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, simt::Site site = simt::Site::current()) {
  const int lane = simt::lane_index(), end = (lane | (width - 1)) + 1, source = lane ^ bits;
  return simt::shuffle(mask, value, source < end ? source : lane, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32, simt::Site site = simt::Site::current()) {
  const int lane = simt::lane_index(), end = (lane | (width - 1)) + 1, source = lane + delta;
  return simt::shuffle(mask, value, source < end ? source : lane, site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32, simt::Site site = simt::Site::current()) {
  const int lane = simt::lane_index(), begin = lane & ~(width - 1), source = lane - delta;
  return simt::shuffle(mask, value, source >= begin ? source : lane, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  const simt::Packet* lanes = simt::exchange(simt::Collective::kVote, mask, simt::packet(predicate != 0), site);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) && simt::unpack<bool>(lanes[lane])) votes |= 1u << lane;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  return __ballot_sync(mask, predicate, site) == mask;
}

// Atomics are relaxed, as CUDA's are, and return the old value.
template <typename T>
T atomicAdd(T* address, T value) {
  return std::atomic_ref<T>(*address).fetch_add(value, std::memory_order_relaxed);
}
template <typename T>
T atomicCAS(T* address, T expected, T value) {
  std::atomic_ref<T>(*address).compare_exchange_strong(expected, value, std::memory_order_relaxed);
  return expected;
}
template <typename T>
T atomicMax(T* address, T value) {
  std::atomic_ref<T> target(*address);
  T old = target.load(std::memory_order_relaxed);
  while (old < value && !target.compare_exchange_weak(old, value, std::memory_order_relaxed)) {
  }
  return old;
}

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline int __ffs(unsigned bits) { return bits == 0 ? 0 : std::countr_zero(bits) + 1; }
inline int __popc(unsigned bits) { return std::popcount(bits); }
