#include "engine/kv_blocks.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace hybrid {

KvBlockPool::KvBlockPool(int64_t size) : references_(size, 0), free_(size) {
  for (int64_t i = 0; i < size; ++i) free_[i] = static_cast<int32_t>(size - 1 - i);
}

int32_t KvBlockPool::allocate() {
  if (free_.empty()) throw std::logic_error("KvBlockPool::allocate: no free block of " + std::to_string(size()));
  const int32_t block = free_.back();
  free_.pop_back();
  references_[block] = 1;
  peak_used_ = std::max(peak_used_, used());
  return block;
}

void KvBlockPool::retain(int32_t block) {
  if (references(block) == 0)
    throw std::logic_error("KvBlockPool::retain: block " + std::to_string(block) + " is free");
  ++references_[block];
}

bool KvBlockPool::release(int32_t block) {
  if (references(block) == 0)
    throw std::logic_error("KvBlockPool::release: block " + std::to_string(block) + " is free");
  if (--references_[block] > 0) return false;
  free_.push_back(block);
  return true;
}

int32_t KvBlockPool::references(int32_t block) const {
  if (block < 0 || block >= size()) throw std::logic_error("KvBlockPool: no block " + std::to_string(block));
  return references_[block];
}

KvArena::KvArena(const KvCacheLayout& layout, int64_t layers, int64_t blocks)
    : layout_(layout), layers_(layers), blocks_(blocks), data_(layers * blocks * layout.block_stride()) {}

void KvArena::copy_block(int32_t from, int32_t to) {
  const int64_t floats = layers_ * layout_.block_stride();
  std::copy_n(data_.data() + from * floats, floats, data_.data() + to * floats);
}

void KvArena::poison_block(int32_t block) {
  const int64_t floats = layers_ * layout_.block_stride();
  std::fill_n(data_.data() + block * floats, floats, std::numeric_limits<float>::quiet_NaN());
}

}  // namespace hybrid
