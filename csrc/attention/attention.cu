#include "attention/flash_attention.cuh"
#include "attention/flash_backward.cuh"
#include "attention/paged_attention.cuh"
#include "attention/rope.cuh"

namespace hybrid::cuda {

#define HYBRID_INSTANTIATE(T)                                      \
  template void paged_attention(const PagedAttentionParams<T>&, Stream); \
  template void flash_attention(FlashAttentionParams<T>, Stream);  \
  template void attention_backward(AttentionBackwardParams<T>, Stream);  \
  template void rope(const RopeParams<T>&, Stream);                \
  template void kv_append(const KvAppendParams<T>&, Stream);       \
  template void rope_append(const RopeAppendParams<T>&, Stream);

HYBRID_INSTANTIATE(float)
HYBRID_INSTANTIATE(f16)
HYBRID_INSTANTIATE(bf16)

}  // namespace hybrid::cuda
