#include "linear/scratch.h"

#include <memory>
#include <new>

namespace hybrid {
namespace {

constexpr std::align_val_t kCacheLine{64};

struct Free {
  void operator()(float* p) const { ::operator delete[](p, kCacheLine); }
};

struct Buffer {
  std::unique_ptr<float[], Free> data;
  int64_t floats = 0;
};

}  // namespace

float* thread_scratch(ScratchSlot slot, int64_t floats) {
  thread_local Buffer buffers[static_cast<int>(ScratchSlot::kCount)];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (floats > buffer.floats) {
    buffer.data.reset();  // first: the old and the new one need not fit together
    buffer.floats = 0;
    buffer.data.reset(static_cast<float*>(::operator new[](floats * sizeof(float), kCacheLine)));
    buffer.floats = floats;
  }
  return buffer.data.get();
}

}  // namespace hybrid
