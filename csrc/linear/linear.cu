#include "linear/skinny_linear.cuh"

namespace hybrid::cuda {

#define HYBRID_INSTANTIATE(T)                                          \
  template void skinny_linear(const SkinnyLinearParams<T>&, Stream); \
  template void skinny_linear_activation(const SkinnyLinearParams<T>&, Activation, bool, Stream);

HYBRID_INSTANTIATE(float)
HYBRID_INSTANTIATE(f16)
HYBRID_INSTANTIATE(bf16)

}  // namespace hybrid::cuda
