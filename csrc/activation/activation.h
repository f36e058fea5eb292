// Elementwise activations fused with a bias or a gate.
#pragma once
#include <cstdint>
#include <string_view>

namespace hybrid {

enum class Activation { kRelu, kSilu, kGeluTanh, kGeluErf };
Activation parse_activation(std::string_view name);  // throws std::invalid_argument naming the four kinds

// y[rows, cols] = act(x + bias); bias may be nullptr, y may alias x.
void bias_activation(const float* x, const float* bias, float* y, int64_t rows, int64_t cols, Activation kind);
// y[rows, cols] = act(gate_up[:, :cols]) * gate_up[:, cols:]; gate_up is [rows, 2 * cols] contiguous.
void gated_activation(const float* gate_up, float* y, int64_t rows, int64_t cols, Activation kind);

// grad_x = grad_y act'(x + bias) [rows, cols]; it is also the gradient of the pre-activation that column_sum wants.
void bias_activation_backward(const float* grad_y, const float* x, const float* bias, float* grad_x, int64_t rows,
                              int64_t cols, Activation kind);
// Both halves of grad_gate_up [rows, 2 * cols].
void gated_activation_backward(const float* grad_y, const float* gate_up, float* grad_gate_up, int64_t rows,
                               int64_t cols, Activation kind);

// out[cols] = sum over rows of x[rows, cols], in blocks of kColumnSumRows rows and then over the blocks.
constexpr int64_t kColumnSumRows = 64;
constexpr int64_t column_sum_blocks(int64_t rows) { return (rows + kColumnSumRows - 1) / kColumnSumRows; }
void column_sum(const float* x, float* partial, float* out, int64_t rows, int64_t cols);  // partial [blocks, cols]

}  // namespace hybrid
