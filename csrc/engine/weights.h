// Named tensors resolved once per bind into the pointers that the layer walk reads. No matrix is copied: their pointers are the
// training module's own storage, float32 or bfloat16. What is small and stored as bfloat16 (norms, biases, position tables,
// low-rank factors) is widened when the layer walk first meets it, and in every pass where it is streamed. A rank of a
// tensor-parallel group binds the rows that it computes, where they lie.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/slices.h"
#include "engine/spec.h"
#include "linear/linear.h"

namespace hybrid {

// A tensor in one piece, or in several that follow each other along the first dimension.
struct TensorView {
  struct Piece {
    Weight data;  // contiguous
    int64_t rows;
  };
  std::vector<Piece> pieces;
  std::vector<int64_t> shape;  // of all pieces together
};
using TensorTable = std::map<std::string, TensorView>;

struct LinearWeights {
  // Outputs whose rows lie one after another.
  struct Range {
    Weight weight;      // [rows, K]
    const float* bias;  // [rows] or nullptr
    int64_t rows;
  };
  // Outputs whose rows of B lie one after another, and the pair that they belong to.
  struct LowRank {
    const float* b;  // [rows, R]
    int64_t rows, pair;
  };
  std::vector<Range> ranges;  // [N, K] all together
  int64_t N = 0, K = 0;
  const float* lora_a = nullptr;  // [pairs * R, K] or nullptr
  std::vector<LowRank> low_rank;  // [N, R] all together
  int64_t lora_pairs = 0, lora_rank = 0;
  float lora_scale = 1;
  int64_t lora_columns() const { return lora_pairs * lora_rank; }
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

// Floats that what is stored as bfloat16 is read through.
struct Widening {
  const BFloat16* from;
  std::unique_ptr<float[]> to;
  int64_t count;
  void run() const { widen(from, count, to.get()); }
};

struct ModelWeights {
  Weight embed_tokens;                     // [V, embed_dim], of which a rank has its slice of V
  const float* embed_positions = nullptr;  // [offset + max_positions, hidden] or nullptr
  const float* rope_cos = nullptr;         // [positions, rotary_dim / 2] or nullptr
  const float* rope_sin = nullptr;
  int64_t max_length = 0;               // tokens that the bound position tables reach
  const float* alibi_slopes = nullptr;  // [H] or nullptr
  LinearWeights project_in, project_out;
  Weight head;  // likewise, the embedding itself when tied
  NormWeights final_norm;
  std::vector<BlockWeights> blocks;
  int64_t max_lora_columns = 0;                   // widest low-rank intermediate, for scratch
  std::vector<std::vector<Widening>> widenings;   // of each part, numbered as in weight_gate.h
};

// Resolves every parameter of `spec` in `table` (names of docs/design.md, plus rope_cos, rope_sin, alibi_slopes): of linear
// layers, embedding and head the rows of `slices`, the rest whole.
// `lora_scales` maps a linear's name, e.g. "decoder.blocks.0.qkv", to its scale; a linear with lora_a must be in it.
// Throws std::invalid_argument naming the parameter, what was expected and what came; leftover names are errors too.
ModelWeights resolve_weights(const DecoderSpec& spec, const Slices& slices, const TensorTable& table,
                             const std::map<std::string, float>& lora_scales);

}  // namespace hybrid
