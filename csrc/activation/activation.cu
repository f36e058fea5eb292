#include "activation/activation.cuh"

namespace hybrid::cuda {

#define HYBRID_INSTANTIATE(T)                                                                           \
  template void bias_activation(const BiasActivationParams<T>&, Activation, Stream);                    \
  template void bias_activation_backward(const BiasActivationBackwardParams<T>&, Activation, Stream);   \
  template void gated_activation(const GatedActivationParams<T>&, Activation, Stream);                  \
  template void gated_activation_backward(const GatedActivationBackwardParams<T>&, Activation, Stream);

HYBRID_INSTANTIATE(float)
HYBRID_INSTANTIATE(f16)
HYBRID_INSTANTIATE(bf16)

}  // namespace hybrid::cuda
