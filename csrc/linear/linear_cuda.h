// The linear layer of a few rows on a GPU: linear.h for fp32, fp16 and bf16, on a stream.
#pragma once
#include <cstdint>

#include "activation/activation.h"

namespace hybrid::cuda {

constexpr int kSkinnyRows = 16;       // at most
constexpr int kMaxLinearSplits = 8;

// y = x weight^T (+ bias) (+ scale * low-rank term), all in fp32, rounded once. The order of each element's sum depends on K alone: a
// row of x gives the same bits whatever the other rows are, and however many.
template <typename T>
struct SkinnyLinearParams {
  const T* x;       // [rows, K]
  const T* weight;  // [N, K]
  const T* bias;    // [N] or nullptr
  T* y;             // [rows, N]
  int64_t rows, N, K;

  // The low-rank term; rank 0: none. Output n belongs to the first split whose end is greater than n.
  const T* lora_a;  // [splits * rank, K]
  const T* lora_b;  // [N, rank]
  float* inner;     // scratch [rows, splits * rank]: x A^T, not rounded
  float scale;
  int rank, splits;
  int64_t split_end[kMaxLinearSplits];
};
template <typename T>
void skinny_linear(const SkinnyLinearParams<T>& params, void* stream);

// act(y), or, where `gated`, act(y[:, :N/2]) y[:, N/2:], to p.y [rows, N] or [rows, N/2], without y itself: y is rounded before the
// activation is taken, so that the bits are those of skinny_linear and activation_cuda.h.
template <typename T>
void skinny_linear_activation(const SkinnyLinearParams<T>& params, Activation kind, bool gated, void* stream);

}  // namespace hybrid::cuda
