#include "sampling/sampling.cuh"
#include "sampling/skinny_head.cuh"

namespace hybrid::cuda {

#define HYBRID_INSTANTIATE(T)                                                     \
  template void token_logprobs(const ScoreParams<T>&, Stream);                    \
  template void token_logprobs_backward(const ScoreBackwardParams<T>&, Stream);   \
  template void sample(const SampleParams<T>&, Stream);                           \
  template void sample_skinny_head(const HeadSampleParams<T>&, Stream);

HYBRID_INSTANTIATE(float)
HYBRID_INSTANTIATE(f16)
HYBRID_INSTANTIATE(bf16)

}  // namespace hybrid::cuda
