// Parameters made whole on a GPU: the contract of unshard.h, with device memory, on a stream.
#pragma once
#include "gather/unshard.h"

namespace hybrid::cuda {

// One launch for every 64 runs. The lists lie in host memory; they are read before the call returns.
void unshard(const UnshardArgs& args, void* stream);

}  // namespace hybrid::cuda
