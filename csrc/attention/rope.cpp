#include "attention/attention.h"
#include "common/isa.h"

namespace hybrid {

HYBRID_DECLARE_SIMD(void rope(const RopeArgs& args))
HYBRID_DECLARE_SIMD(void kv_append(const float* k, const float* v, int64_t row_stride, int64_t rows, const int64_t* slots,
                                   const KvCacheLayout& layout, float* cache))
HYBRID_DECLARE_SIMD(void rope_append(const RopeAppendArgs& args))

void rope(const RopeArgs& args) { HYBRID_PICK_SIMD(rope)(args); }

void kv_append(const float* k, const float* v, int64_t row_stride, int64_t rows, const int64_t* slots,
               const KvCacheLayout& layout, float* cache) {
  HYBRID_PICK_SIMD(kv_append)(k, v, row_stride, rows, slots, layout, cache);
}

void rope_append(const RopeAppendArgs& args) { HYBRID_PICK_SIMD(rope_append)(args); }

}  // namespace hybrid
