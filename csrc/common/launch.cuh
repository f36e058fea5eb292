// Starting a kernel, on a stream or in the host runner.
#pragma once
#include <stdexcept>
#include <string>

#include "common/device.cuh"

namespace hybrid::cuda {

struct LaunchShape {
  dim3 grid, block;
  size_t dynamic_shared = 0;  // bytes; beyond 48 KiB the kernel is opted in, up to what the device has (99 KiB on sm_86)
};

#ifdef __CUDACC__
inline void require_success(cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("hybrid_kernels: a kernel could not be launched: ") + cudaGetErrorString(error));
}
#endif

// Runs kernel(args...) on every thread of the shape. Throws std::runtime_error for a launch that the device refuses.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const LaunchShape& shape, Stream stream, Args... args) {
#ifdef __CUDACC__
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shape.dynamic_shared > kWithoutAsking) {
    const auto bytes = static_cast<int>(shape.dynamic_shared);
    require_success(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  }
  kernel<<<shape.grid, shape.block, shape.dynamic_shared, static_cast<cudaStream_t>(stream)>>>(args...);
  require_success(cudaGetLastError());
#else
  (void)stream;
  simt::run_grid(shape.grid, shape.block, shape.dynamic_shared, [&] { kernel(args...); });
#endif
}

}  // namespace hybrid::cuda
