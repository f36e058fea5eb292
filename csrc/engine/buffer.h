// Uninitialised, cache-line aligned floats.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace hybrid {

class FloatBuffer {
 public:
  FloatBuffer() = default;
  explicit FloatBuffer(int64_t size) : size_(size) {
    constexpr size_t kAlignment = 64;  // a cache line, and the widest vector
    const size_t lines = (static_cast<size_t>(size) * sizeof(float) + kAlignment - 1) / kAlignment;
    data_.reset(static_cast<float*>(std::aligned_alloc(kAlignment, (lines ? lines : 1) * kAlignment)));
    if (data_ == nullptr) throw std::bad_alloc();
  }

  float* data() const { return data_.get(); }
  int64_t bytes() const { return size_ * static_cast<int64_t>(sizeof(float)); }

 private:
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

}  // namespace hybrid
