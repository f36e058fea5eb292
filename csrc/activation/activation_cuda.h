// Activations fused with a bias or a gate, on a GPU: the contract of activation.h for fp32, fp16 and bf16, on a stream.
#pragma once
#include <cstdint>

#include "activation/activation.h"

namespace hybrid::cuda {

// y = act(x + bias) in fp32, rounded once; bias may be nullptr, y may alias x.
template <typename T>
struct BiasActivationParams {
  const T* x;     // [rows, cols]
  const T* bias;  // [cols] or nullptr
  T* y;           // [rows, cols]
  int64_t rows, cols;
};
template <typename T>
void bias_activation(const BiasActivationParams<T>& params, Activation kind, void* stream);

// grad_x = grad_y act'(x + bias). The bias's gradient sums grad_x before it is rounded: over blocks of kColumnSumRows rows, then
// over the blocks, so that it does not depend on the device.
template <typename T>
struct BiasActivationBackwardParams {
  const T* grad_y;  // [rows, cols]
  const T* x;       // [rows, cols]
  const T* bias;    // [cols] or nullptr
  T* grad_x;        // [rows, cols]
  T* grad_bias;     // [cols]; nullptr when bias is
  float* partial;   // scratch [column_sum_blocks(rows), cols]; nullptr when bias is
  int64_t rows, cols;
};
template <typename T>
void bias_activation_backward(const BiasActivationBackwardParams<T>& params, Activation kind, void* stream);

// y = act(gate) up, with gate_up [rows, 2 cols] = gate | up.
template <typename T>
struct GatedActivationParams {
  const T* gate_up;  // [rows, 2 * cols]
  T* y;              // [rows, cols]
  int64_t rows, cols;
};
template <typename T>
void gated_activation(const GatedActivationParams<T>& params, Activation kind, void* stream);

template <typename T>
struct GatedActivationBackwardParams {
  const T* grad_y;   // [rows, cols]
  const T* gate_up;  // [rows, 2 * cols]
  T* grad_gate_up;   // [rows, 2 * cols]
  int64_t rows, cols;
};
template <typename T>
void gated_activation_backward(const GatedActivationBackwardParams<T>& params, Activation kind, void* stream);

}  // namespace hybrid::cuda
