#include "linear/scratch.h"

#include <memory>
#include <new>

#include "common/kernel_memory.h"

namespace hybrid {
namespace {

constexpr std::align_val_t kCacheLine{64};

struct Free {
  void operator()(float* p) const { ::operator delete[](p, kCacheLine); }
};

struct Buffer {
  std::unique_ptr<float[], Free> data;
  int64_t floats = 0;

  void resize(int64_t size) {
    data.reset();  // first: the old and the new one need not fit together
    kernel_memory_bytes -= floats * static_cast<int64_t>(sizeof(float));
    floats = 0;
    data.reset(size == 0 ? nullptr : static_cast<float*>(::operator new[](size * sizeof(float), kCacheLine)));
    floats = size;
    kernel_memory_bytes += floats * static_cast<int64_t>(sizeof(float));
  }
  ~Buffer() { resize(0); }
};

}  // namespace

float* thread_scratch(ScratchSlot slot, int64_t floats) {
  thread_local Buffer buffers[static_cast<int>(ScratchSlot::kCount)];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (floats > buffer.floats) buffer.resize(floats);
  return buffer.data.get();
}

}  // namespace hybrid
