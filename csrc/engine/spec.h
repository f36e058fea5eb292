// The declarative description of a decoder: the facts of hybrid_engine.models.DecoderSpec that generation needs.
#pragma once
#include <cstdint>

#include "activation/activation.h"

namespace hybrid {

enum class NormKind { kRms, kLayer };
enum class PositionKind { kRotary, kLearned, kAlibi };

struct DecoderSpec {
  int64_t vocab_size = 0, hidden_size = 0, embed_dim = 0, num_layers = 0;
  int64_t heads = 0, kv_heads = 0, head_dim = 0, intermediate_size = 0, max_positions = 0;
  NormKind norm = NormKind::kRms;
  float norm_eps = 0;
  bool post_norm = false;  // normalise after the residual addition (OPT-350m)
  bool final_norm = true;
  PositionKind positions = PositionKind::kRotary;
  int64_t position_offset = 0;  // learned: row of position zero
  int64_t rotary_dim = 0;
  Activation activation = Activation::kSilu;
  bool gated_mlp = false;
  bool qk_norm = false;
  bool tied_head = false;
  float attention_scale = 1;
  int64_t sliding_window = 0;  // 0: every key is visible

  int64_t q_size() const { return heads * head_dim; }
  bool projects_embedding() const { return embed_dim != hidden_size; }

  void validate() const;  // throws std::invalid_argument naming the field
};

}  // namespace hybrid
