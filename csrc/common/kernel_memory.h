// Bytes of working memory that kernels keep between calls, over all threads: part of what a rollout declares to use.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace hybrid {

inline std::atomic<int64_t> kernel_memory_bytes{0};

template <typename T>
struct KernelAllocator {
  using value_type = T;
  KernelAllocator() = default;
  template <typename U>
  KernelAllocator(const KernelAllocator<U>&) {}

  T* allocate(size_t count) {
    T* memory = std::allocator<T>().allocate(count);
    kernel_memory_bytes += static_cast<int64_t>(count * sizeof(T));
    return memory;
  }
  void deallocate(T* memory, size_t count) {
    kernel_memory_bytes -= static_cast<int64_t>(count * sizeof(T));
    std::allocator<T>().deallocate(memory, count);
  }
  friend bool operator==(const KernelAllocator&, const KernelAllocator&) { return true; }
};

// A vector whose memory counts.
template <typename T>
using KernelVector = std::vector<T, KernelAllocator<T>>;

// Room for `size` elements, which may hold anything, in a vector that grows to the largest room asked for. Where it grows,
// the old memory goes first: both need not fit together.
template <typename T>
std::span<T> room_for(KernelVector<T>& vector, size_t size) {
  if (vector.size() < size) {
    KernelVector<T>().swap(vector);
    KernelVector<T>(size).swap(vector);
  }
  return {vector.data(), size};
}

}  // namespace hybrid
