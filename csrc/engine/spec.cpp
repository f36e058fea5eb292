#include "engine/spec.h"

#include <stdexcept>
#include <string>

namespace hybrid {
namespace {

void require_positive(int64_t value, const char* field) {
  if (value <= 0) {
    throw std::invalid_argument(std::string("DecoderSpec.") + field + " must be positive, got " +
                                std::to_string(value));
  }
}

}  // namespace

void DecoderSpec::validate() const {
  require_positive(vocab_size, "vocab_size");
  require_positive(hidden_size, "hidden_size");
  require_positive(embed_dim, "embed_dim");
  require_positive(num_layers, "num_layers");
  require_positive(heads, "heads");
  require_positive(kv_heads, "kv_heads");
  require_positive(head_dim, "head_dim");
  require_positive(intermediate_size, "intermediate_size");
  require_positive(max_positions, "max_positions");
  if (heads % kv_heads != 0) {
    throw std::invalid_argument("DecoderSpec.heads (" + std::to_string(heads) + ") must be a multiple of kv_heads (" +
                                std::to_string(kv_heads) + ")");
  }
  if (positions == PositionKind::kRotary && (rotary_dim <= 0 || rotary_dim % 2 != 0 || rotary_dim > head_dim)) {
    throw std::invalid_argument("DecoderSpec.rope.rotary_dim must be even and in [2, head_dim], got " +
                                std::to_string(rotary_dim));
  }
  if (sliding_window < 0) {
    throw std::invalid_argument("DecoderSpec.sliding_window must not be negative, got " +
                                std::to_string(sliding_window));
  }
}

}  // namespace hybrid
