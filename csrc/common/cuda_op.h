// What the tensor functions of CUDA kernels share. They compile against any build of torch: the stream and the device come from
// c10's guards, and no header of c10/cuda or ATen/cuda is needed.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <optional>

#include "common/formats.h"

namespace hybrid {

// Makes a tensor's device the current one while it lives; `stream` is that device's current stream.
class OnDevice {
 public:
  explicit OnDevice(const at::Tensor& tensor)
      : guard_(tensor.device()),
        stream(c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getStream(tensor.device()).native_handle()) {}

 private:
  c10::DeviceGuard guard_;

 public:
  void* const stream;
};

// Calls fn with a value of the C++ type that stands for the dtype.
template <typename Fn>
auto dispatch_float(const char* op, const at::Tensor& tensor, const Fn& fn) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return fn(float{});
    case at::kHalf: return fn(f16{});
    case at::kBFloat16: return fn(bf16{});
    default:
      TORCH_CHECK_VALUE(false, op, ": dtype is ", c10::toString(tensor.scalar_type()),
                        "; expected Float, Half or BFloat16");
  }
}

template <typename T>
const T* input(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr;
}
template <typename T>
T* output(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

inline at::Tensor contiguous(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->contiguous() : at::Tensor();
}

}  // namespace hybrid
