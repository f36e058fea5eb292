// Numbers in float, whatever format they are stored in: fp32, fp16 or bf16. A store rounds once, to nearest even.
#pragma once
#include "common/formats.h"
#include "common/ptx.cuh"

namespace hybrid::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(f16 x) { return cvt_f32(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

template <typename T>
__device__ __forceinline__ T round_to(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, f16>) {
    return cvt_rn_f16(x);
  } else {
    return cvt_rn_bf16(x);
  }
}

// The value that a store of x and a load give back.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(round_to<T>(x));
}

}  // namespace hybrid::cuda
