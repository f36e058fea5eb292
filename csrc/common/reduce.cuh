// Reductions over a warp and a block, in an order that depends on the number of threads alone: the same bits on every run.
#pragma once
#include "common/shared.cuh"

namespace hybrid::cuda {

struct Plus {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

// Lanes combine in pairs, pairs of pairs and so on (a butterfly); `combine` is commutative, so all lanes get the same bits.
template <typename T, typename Combine = Plus>
__device__ __forceinline__ T reduce_warp(T value, Combine combine = {}) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// Reductions of one-dimensional blocks of whole warps; every thread gets the result. Consecutive calls use two buffers in turn, so
// that one barrier a call is enough: no thread writes a buffer again before all have passed the barrier of the call between.
template <typename T>
class BlockReducer {
 public:
  __device__ __forceinline__ BlockReducer() : buffers_(shared_memory<Buffers>()) {}

  template <typename Combine = Plus>
  __device__ __forceinline__ T operator()(T value, T identity = T(0), Combine combine = {}) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int warps = blockDim.x / kWarpSize;
    T* partial = buffers_.partial[turn_];
    turn_ = 1 - turn_;
    value = reduce_warp(value, combine);
    if (lane == 0) partial[warp] = value;
    __syncthreads();
    return reduce_warp(lane < warps ? partial[lane] : identity, combine);
  }

 private:
  struct Buffers {
    T partial[2][kWarpSize];
  };
  Buffers& buffers_;
  int turn_ = 0;
};

}  // namespace hybrid::cuda
