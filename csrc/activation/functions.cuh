// The activations in fp32, one element at a time.
#pragma once
#include "activation/activation.h"
#include "common/device.cuh"

namespace hybrid::cuda {

// An activation has value(x) and slope(x) = its derivative.
struct Relu {
  static __device__ float value(float x) { return x < 0.0f ? 0.0f : x; }  // a NaN stays
  static __device__ float slope(float x) { return x <= 0.0f ? 0.0f : 1.0f; }
};

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

struct Silu {  // x sigmoid(x)
  static __device__ float value(float x) { return x * sigmoid(x); }
  static __device__ float slope(float x) {
    const float s = sigmoid(x);
    return s * fmaf(x, 1.0f - s, 1.0f);
  }
};

struct GeluTanh {  // x (1 + tanh u) / 2 with u = sqrt(2/pi) (x + 0.044715 x^3)
  static constexpr float kScale = 0.7978845608f, kCubic = 0.044715f;
  static __device__ float value(float x) {
    const float u = kScale * fmaf(kCubic * x * x, x, x);
    return (0.5f * x) * (1.0f + tanhf(u));
  }
  static __device__ float slope(float x) {
    x = x < -10.0f ? -10.0f : x > 10.0f ? 10.0f : x;  // the slope is 0 or 1 beyond, where x^2 may overflow; a NaN stays
    const float square = x * x;
    const float t = tanhf(kScale * fmaf(kCubic * square, x, x));
    const float du = kScale * fmaf(3.0f * kCubic, square, 1.0f);
    return fmaf(0.5f * x * (1.0f - t * t), du, 0.5f * (1.0f + t));
  }
};

struct GeluErf {  // x Phi(x), Phi the normal distribution
  static constexpr float kRootHalf = 0.7071067812f, kDensity = 0.3989422804f;
  static __device__ float value(float x) { return (0.5f * x) * (1.0f + erff(x * kRootHalf)); }
  static __device__ float slope(float x) {
    const float cumulative = 0.5f * (1.0f + erff(x * kRootHalf));
    return fmaf(x * kDensity, expf(-0.5f * x * x), cumulative);
  }
};

// The value of one that is known when the kernel runs.
__device__ __forceinline__ float activation_value(Activation kind, float x) {
  switch (kind) {
    case Activation::kRelu: return Relu::value(x);
    case Activation::kSilu: return Silu::value(x);
    case Activation::kGeluTanh: return GeluTanh::value(x);
    case Activation::kGeluErf: break;
  }
  return GeluErf::value(x);
}

}  // namespace hybrid::cuda
