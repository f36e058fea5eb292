// Starting a kernel, on a stream or in the host runner.
#pragma once
#include <stdexcept>
#include <string>

#include "common/device.cuh"

namespace hybrid::cuda {

struct LaunchShape {
  dim3 grid, block;
  size_t dynamic_shared = 0;  // bytes, at most 48 KiB
};

// Runs kernel(args...) on every thread of the shape. Throws std::runtime_error for a launch that the device refuses.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const LaunchShape& shape, Stream stream, Args... args) {
#ifdef __CUDACC__
  kernel<<<shape.grid, shape.block, shape.dynamic_shared, static_cast<cudaStream_t>(stream)>>>(args...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("hybrid_kernels: a kernel could not be launched: ") +
                             cudaGetErrorString(error));
  }
#else
  (void)stream;
  simt::run_grid(shape.grid, shape.block, shape.dynamic_shared, [&] { kernel(args...); });
#endif
}

}  // namespace hybrid::cuda
