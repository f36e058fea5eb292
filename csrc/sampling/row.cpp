#include "sampling/row.h"

namespace hybrid {

HYBRID_DECLARE_SIMD(float block_maxima(const float* logits, int64_t vocab, float* maxima);
                    RowSums weight_sums(const float* logits, int64_t vocab, RowShift shift, float* sums);
                    void block_weights(const float* logits, int64_t count, RowShift shift, float* weights);
                    void score_row_backward(const RowGradArgs& args))

float block_maxima(const float* logits, int64_t vocab, float* maxima) {
  return HYBRID_PICK_SIMD(block_maxima)(logits, vocab, maxima);
}

RowSums weight_sums(const float* logits, int64_t vocab, RowShift shift, float* sums) {
  return HYBRID_PICK_SIMD(weight_sums)(logits, vocab, shift, sums);
}

void block_weights(const float* logits, int64_t count, RowShift shift, float* weights) {
  HYBRID_PICK_SIMD(block_weights)(logits, count, shift, weights);
}

void score_row_backward(const RowGradArgs& args) { HYBRID_PICK_SIMD(score_row_backward)(args); }

}  // namespace hybrid
