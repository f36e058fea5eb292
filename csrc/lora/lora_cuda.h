// Merging a low-rank adapter into its weight on a GPU, and taking it out again without a trace: lora.h for fp32, fp16 and bf16.
#pragma once
#include <cstdint>

#include "common/formats.h"

namespace hybrid::cuda {

constexpr int kMaxLoraSplits = 8;

// delta[n, :] = scale * sum_r b[n, r] a[split(n) * rank + r, :], fused multiply-adds in float, r ascending: the same bits in every
// kernel below.
struct LoraParams {
  const float* a;  // [splits * rank, cols]
  const float* b;  // [rows, rank]
  float scale;
  int rank;
  int64_t rows, cols;
  int splits;
  int64_t split_end[kMaxLoraSplits];  // the first row after each split
};

// merged = weight + delta, rounded once; merged may alias weight.
template <typename T>
void lora_merge(const LoraParams& params, const T* weight, T* merged, void* stream);

// What a merge in place loses. Subtracting delta again lands near the base: `residual` counts the representable numbers between.
// Where that count does not fit into int8, or a number is not finite, the base value itself is an escape.
template <typename T>
struct LoraEscapes {
  int64_t* index;  // [count] row * cols + column, in an order that depends on the shape alone
  T* value;        // [count] the base's values
};

// Blocks of the grid over the weight; `offsets` below has one more entry.
constexpr int kTileRows = 8, kLoraWarps = 4;  // rows of a thread; warps of a block, one above another
constexpr int64_t lora_tiles(int64_t rows, int64_t cols, int64_t element_bytes) {
  const int64_t height = kTileRows * kLoraWarps, width = 32 * 16 / element_bytes;
  return (rows + height - 1) / height * ((cols + width - 1) / width);
}

// Escapes of each tile, then their running sum: offsets[0] = 0, ..., offsets[tiles] = how many in all. The weight is only read.
template <typename T>
void lora_count_escapes(const LoraParams& params, const T* weight, int64_t* offsets, void* stream);

template <typename T>
void lora_merge_in_place(const LoraParams& params, T* weight, int8_t* residual, const int64_t* offsets,
                         const LoraEscapes<T>& escapes, void* stream);

template <typename T>
void lora_unmerge_in_place(const LoraParams& params, T* weight, const int8_t* residual, const LoraEscapes<T>& escapes,
                           int64_t escape_count, void* stream);

}  // namespace hybrid::cuda
