// Row-wise normalisation on a GPU: the contract of norm.h for fp32, fp16 and bf16, on a stream.
#pragma once
#include <cstdint>

#include "norm/norm.h"

namespace hybrid::cuda {

// y = norm(s) * weight + bias with s = x + residual rounded to T, which is what `sum` receives: the fused form gives the bits of
// the two steps. Statistics and everything after them are fp32; y is rounded once.
template <typename T>
struct NormParams {
  const T* x;         // [rows, cols]
  const T* residual;  // [rows, cols] or nullptr
  T* sum;             // [rows, cols] (may alias x or residual); nullptr when residual is
  const T* weight;    // [cols]
  const T* bias;      // [cols] or nullptr
  T* y;               // [rows, cols]
  float* mean;        // [rows] or nullptr (unused by rms_norm)
  float* rstd;        // [rows] or nullptr
  int64_t rows, cols;
  float eps;
};
template <typename T>
void rms_norm(const NormParams<T>& params, void* stream);
template <typename T>
void layer_norm(const NormParams<T>& params, void* stream);

template <typename T>
struct NormBackwardParams {
  const T* grad_y;     // [rows, cols]
  const T* x;          // [rows, cols] what was normalised: x + residual in the residual forms
  const T* weight;     // [cols]
  const float* mean;   // [rows]; unused by rms_norm_backward
  const float* rstd;   // [rows]
  T* grad_x;           // [rows, cols]
  T* grad_weight;      // [cols]
  T* grad_bias;        // [cols]; unused by rms_norm_backward
  float* partial;      // scratch [norm_backward_blocks(rows), 2, cols]; rms_norm_backward needs [.., 1, cols]
  int64_t rows, cols;
};
template <typename T>
void rms_norm_backward(const NormBackwardParams<T>& params, void* stream);
template <typename T>
void layer_norm_backward(const NormBackwardParams<T>& params, void* stream);

}  // namespace hybrid::cuda
