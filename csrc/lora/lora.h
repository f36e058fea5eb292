// Merging a low-rank adapter into its weight, and taking it out again without a trace.
#pragma once
#include <bit>
#include <cstdint>
#include <vector>

#include "common/bfloat16.h"

namespace hybrid {

// delta[n, :] = scale * sum_r b[n, r] a[split(n) * R + r, :], r in ascending order: the same bits whenever it is
// computed, on any number of threads.
struct LoraFactors {
  const float* a;         // [num_splits * R, K], one block of R rows a split
  const float* b;         // [N, R]
  const int64_t* splits;  // [num_splits] output widths, summing to N
  int64_t num_splits;
  int64_t R;
  float scale;
  int64_t N, K;
};

// merged[N, K] = weight + delta, added in float and rounded once. Either may be fp32 or bf16; merged may alias weight.
template <typename Weight>
void lora_merge(const Weight* weight, const LoraFactors& factors, Weight* merged);

// What merging in place loses. Subtracting delta again lands near the base; residual counts the representable numbers
// between. Where that count does not fit into int8, or a number is not finite, the base value itself is an escape.
template <typename Weight>
struct LoraEscape {
  int64_t index;  // n * K + k
  Weight value;
};

template <typename Weight>
std::vector<LoraEscape<Weight>> lora_merge_in_place(Weight* weight, const LoraFactors& factors, int8_t* residual);

// Restores the bytes from before lora_merge_in_place, given the same factors on the same processor.
template <typename Weight>
void lora_unmerge_in_place(Weight* weight, const LoraFactors& factors, const int8_t* residual,
                           const int64_t* escape_index, const Weight* escape_value, int64_t escapes);

}  // namespace hybrid
