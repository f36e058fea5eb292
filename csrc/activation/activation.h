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

}  // namespace hybrid
