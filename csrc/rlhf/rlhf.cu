#include "rlhf/rlhf.cuh"  // defines everything that rlhf_cuda.h declares
