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

}  // namespace hybrid
