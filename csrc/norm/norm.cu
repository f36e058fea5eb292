#include "norm/norm.cuh"

namespace hybrid::cuda {

#define HYBRID_INSTANTIATE(T)                                             \
  template void rms_norm(const NormParams<T>&, Stream);                   \
  template void layer_norm(const NormParams<T>&, Stream);                 \
  template void rms_norm_backward(const NormBackwardParams<T>&, Stream);  \
  template void layer_norm_backward(const NormBackwardParams<T>&, Stream);

HYBRID_INSTANTIATE(float)
HYBRID_INSTANTIATE(f16)
HYBRID_INSTANTIATE(bf16)

}  // namespace hybrid::cuda
