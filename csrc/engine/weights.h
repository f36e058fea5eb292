// Named tensors resolved once per bind into the pointers that the layer walk reads. No matrix is copied: their pointers are the
// training module's own storage, float32 or bfloat16. What is small and stored as bfloat16 (norms, biases, position tables,
// low-rank factors) is widened once.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/spec.h"
#include "linear/linear.h"

namespace hybrid {

struct TensorView {
  Weight data;  // contiguous
  std::vector<int64_t> shape;
};
using TensorTable = std::map<std::string, TensorView>;

struct LinearWeights {
  Weight weight;                // [N, K]
  const float* bias = nullptr;  // [N] or nullptr
  int64_t N = 0, K = 0;
  const float* lora_a = nullptr;  // [splits * R, K] or nullptr
  const float* lora_b = nullptr;  // [N, R]
  int64_t lora_rank = 0;
  float lora_scale = 1;
  std::vector<int64_t> splits;  // [num_splits], sums to N
  int64_t lora_columns() const { return static_cast<int64_t>(splits.size()) * lora_rank; }
};

struct NormWeights {
  const float* weight = nullptr;
  const float* bias = nullptr;
};

struct BlockWeights {
  NormWeights attn_norm, mlp_norm;
  LinearWeights qkv, attn_out, mlp_in, mlp_out;
  const float* q_norm = nullptr;  // [D] or nullptr
  const float* k_norm = nullptr;
};

struct ModelWeights {
  Weight embed_tokens;                     // [V, embed_dim]
  const float* embed_positions = nullptr;  // [offset + max_positions, hidden] or nullptr
  const float* rope_cos = nullptr;         // [positions, rotary_dim / 2] or nullptr
  const float* rope_sin = nullptr;
  int64_t max_length = 0;               // tokens that the bound position tables reach
  const float* alibi_slopes = nullptr;  // [H] or nullptr
  LinearWeights project_in, project_out;
  Weight head;  // [V, embed_dim], the embedding itself when tied
  NormWeights final_norm;
  std::vector<BlockWeights> blocks;
  int64_t max_lora_columns = 0;                   // widest low-rank intermediate, for scratch
  std::vector<std::unique_ptr<float[]>> widened;  // what the pointers to float above point to, where it was bfloat16
};

// Resolves every parameter of `spec` in `table` (names of docs/design.md, plus rope_cos, rope_sin, alibi_slopes).
// `lora_scales` maps a linear's name, e.g. "decoder.blocks.0.qkv", to its scale; a linear with lora_a must be in it.
// Throws std::invalid_argument naming the parameter, what was expected and what came; leftover names are errors too.
ModelWeights resolve_weights(const DecoderSpec& spec, const TensorTable& table,
                             const std::map<std::string, float>& lora_scales);

}  // namespace hybrid
