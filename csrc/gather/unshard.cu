#include "gather/unshard.cuh"  // defines what unshard_cuda.h declares
