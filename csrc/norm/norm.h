// Row-wise normalisation with an optional fused residual add.
#pragma once
#include <cstdint>

namespace hybrid {

// y = norm(x + residual) * weight + bias; statistics in fp32, one rounding at the output.
struct NormArgs {
  const float* x;         // [rows, cols]
  const float* residual;  // [rows, cols] or nullptr
  float* sum;             // [rows, cols] receives x + residual (may alias x or residual); nullptr when residual is
  const float* weight;    // [cols]
  const float* bias;      // [cols] or nullptr
  float* y;               // [rows, cols]
  float* mean;            // [rows] or nullptr (unused by rms_norm)
  float* rstd;            // [rows] or nullptr
  int64_t rows, cols;
  float eps;
};
void rms_norm(const NormArgs& args);
void layer_norm(const NormArgs& args);

// Gradients of both. The weight's gradient sums over rows: in blocks of kNormBackwardRows rows first, then over the blocks, so
// that neither its bits nor its accuracy depend on the number of threads.
constexpr int64_t kNormBackwardRows = 32;
constexpr int64_t norm_backward_blocks(int64_t rows) { return (rows + kNormBackwardRows - 1) / kNormBackwardRows; }

struct NormBackwardArgs {
  const float* grad_y;  // [rows, cols]
  const float* x;       // [rows, cols] what was normalised: x + residual in the residual forms
  const float* weight;  // [cols]
  const float* mean;    // [rows]; unused by rms_norm_backward
  const float* rstd;    // [rows]
  float* grad_x;        // [rows, cols]
  float* grad_weight;   // [cols]
  float* grad_bias;     // [cols]; unused by rms_norm_backward
  float* partial;       // scratch [norm_backward_blocks(rows), 2, cols]; rms_norm_backward needs [.., 1, cols]
  int64_t rows, cols;
};
void rms_norm_backward(const NormBackwardArgs& args);
void layer_norm_backward(const NormBackwardArgs& args);

}  // namespace hybrid
