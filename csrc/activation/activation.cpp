#include "activation/activation.h"

#include <stdexcept>
#include <string>

#include "common/isa.h"

namespace hybrid {

Activation parse_activation(std::string_view name) {
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "gelu_erf") return Activation::kGeluErf;
  throw std::invalid_argument("activation kind is '" + std::string(name) +
                              "'; expected relu, silu, gelu_tanh or gelu_erf");
}

HYBRID_DECLARE_SIMD(void bias_activation(const float* x, const float* bias, float* y, int64_t rows, int64_t cols,
                                         Activation kind))
HYBRID_DECLARE_SIMD(void gated_activation(const float* gate_up, float* y, int64_t rows, int64_t cols, Activation kind))
HYBRID_DECLARE_SIMD(void bias_activation_backward(const float* grad_y, const float* x, const float* bias, float* grad_x,
                                                  int64_t rows, int64_t cols, Activation kind))
HYBRID_DECLARE_SIMD(void gated_activation_backward(const float* grad_y, const float* gate_up, float* grad_gate_up,
                                                   int64_t rows, int64_t cols, Activation kind))
HYBRID_DECLARE_SIMD(void column_sum(const float* x, float* partial, float* out, int64_t rows, int64_t cols))

void bias_activation(const float* x, const float* bias, float* y, int64_t rows, int64_t cols, Activation kind) {
  HYBRID_PICK_SIMD(bias_activation)(x, bias, y, rows, cols, kind);
}
void gated_activation(const float* gate_up, float* y, int64_t rows, int64_t cols, Activation kind) {
  HYBRID_PICK_SIMD(gated_activation)(gate_up, y, rows, cols, kind);
}
void bias_activation_backward(const float* grad_y, const float* x, const float* bias, float* grad_x, int64_t rows,
                              int64_t cols, Activation kind) {
  HYBRID_PICK_SIMD(bias_activation_backward)(grad_y, x, bias, grad_x, rows, cols, kind);
}
void gated_activation_backward(const float* grad_y, const float* gate_up, float* grad_gate_up, int64_t rows,
                               int64_t cols, Activation kind) {
  HYBRID_PICK_SIMD(gated_activation_backward)(grad_y, gate_up, grad_gate_up, rows, cols, kind);
}
void column_sum(const float* x, float* partial, float* out, int64_t rows, int64_t cols) {
  HYBRID_PICK_SIMD(column_sum)(x, partial, out, rows, cols);
}

}  // namespace hybrid
