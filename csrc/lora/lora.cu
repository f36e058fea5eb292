#include "lora/lora.cuh"

namespace hybrid::cuda {

#define HYBRID_INSTANTIATE(T)                                                                                        \
  template void lora_merge(const LoraParams&, const T*, T*, Stream);                                                 \
  template void lora_count_escapes(const LoraParams&, const T*, int64_t*, Stream);                                   \
  template void lora_merge_in_place(const LoraParams&, T*, int8_t*, const int64_t*, const LoraEscapes<T>&, Stream); \
  template void lora_unmerge_in_place(const LoraParams&, T*, const int8_t*, const LoraEscapes<T>&, int64_t, Stream);

HYBRID_INSTANTIATE(float)
HYBRID_INSTANTIATE(f16)
HYBRID_INSTANTIATE(bf16)

}  // namespace hybrid::cuda
