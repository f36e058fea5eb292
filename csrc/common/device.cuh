// The language of kernels: CUDA's own under nvcc; elsewhere the host runner's imitation, which runs the same files in tests.
#pragma once
#include <cstdint>

#ifndef __CUDACC__
#include "tests/simt/runner.h"
#endif

namespace hybrid::cuda {

using Stream = void*;  // a cudaStream_t, which the torch side need not know

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace hybrid::cuda
