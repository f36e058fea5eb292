#include "norm/norm.h"

#include "common/isa.h"

namespace hybrid {

HYBRID_DECLARE_SIMD(void rms_norm(const NormArgs& args))
HYBRID_DECLARE_SIMD(void layer_norm(const NormArgs& args))
HYBRID_DECLARE_SIMD(void rms_norm_backward(const NormBackwardArgs& args))
HYBRID_DECLARE_SIMD(void layer_norm_backward(const NormBackwardArgs& args))

void rms_norm(const NormArgs& args) { HYBRID_PICK_SIMD(rms_norm)(args); }
void layer_norm(const NormArgs& args) { HYBRID_PICK_SIMD(layer_norm)(args); }
void rms_norm_backward(const NormBackwardArgs& args) { HYBRID_PICK_SIMD(rms_norm_backward)(args); }
void layer_norm_backward(const NormBackwardArgs& args) { HYBRID_PICK_SIMD(layer_norm_backward)(args); }

}  // namespace hybrid
