// A block's shared memory. Kernels take it from here rather than by keyword, so that the host runner can poison and fence it.
#pragma once
#include "common/device.cuh"

namespace hybrid::cuda {

#ifdef __CUDACC__

// The block's one object of this type, uninitialised.
template <typename T>
__device__ __forceinline__ T& shared_memory() {
  __shared__ T storage;
  return storage;
}

// The bytes that the launch asked for, aligned to 16.
template <typename T>
__device__ __forceinline__ T* dynamic_shared_memory() {
  extern __shared__ uint4 hybrid_dynamic_shared[];
  return reinterpret_cast<T*>(hybrid_dynamic_shared);
}

#else

template <typename T>
T& shared_memory(simt::Site site = simt::Site::current()) {
  static const char key = 0;  // one a type
  return *static_cast<T*>(simt::static_shared(&key, sizeof(T), alignof(T), site));
}

template <typename T>
T* dynamic_shared_memory(simt::Site site = simt::Site::current()) {
  return static_cast<T*>(simt::dynamic_shared(site));
}

#endif

}  // namespace hybrid::cuda
