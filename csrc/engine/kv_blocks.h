// KV memory in blocks of kKvTile tokens: which block is whose (KvBlockPool), and the bytes themselves (KvArena).
#pragma once
#include <cstdint>
#include <vector>

#include "attention/attention.h"
#include "engine/buffer.h"

namespace hybrid {

// Reference counts over block numbers [0, size). The free list is a stack, so recently used (warm, already mapped)
// blocks come back first. Misuse throws std::logic_error: it is a bug of the caller, never of the user.
class KvBlockPool {
 public:
  explicit KvBlockPool(int64_t size);

  int32_t allocate();           // with one reference
  void retain(int32_t block);   // one more holder
  bool release(int32_t block);  // one holder less; true when the block became free

  int64_t size() const { return static_cast<int64_t>(references_.size()); }
  int64_t available() const { return static_cast<int64_t>(free_.size()); }
  int64_t used() const { return size() - available(); }
  int64_t peak_used() const { return peak_used_; }
  int32_t references(int32_t block) const;

 private:
  std::vector<int32_t> references_;
  std::vector<int32_t> free_;
  int64_t peak_used_ = 0;
};

// The cache of all layers, block after block, each with its layers' parts as KvCacheLayout says: memory grows by whole
// blocks, and a block is copied in one go. To the kernels a layer is a cache of its own that starts at layer() and whose
// block b is number kernel_block(b). The pages are untouched until a block is first written, so an arena sized for the
// worst case costs memory only for what is used.
class KvArena {
 public:
  KvArena(const KvCacheLayout& layout, int64_t layers, int64_t blocks);

  const KvCacheLayout& layout() const { return layout_; }
  int64_t blocks() const { return blocks_; }
  int64_t bytes() const { return data_.bytes(); }
  float* layer(int64_t layer) { return data_.data() + layer * layout_.block_stride(); }
  int64_t kernel_block(int64_t block) const { return block * layers_; }

  void copy_block(int32_t from, int32_t to);
  void poison_block(int32_t block);  // fills it with NaN, so that a stale read shows

  static int64_t block_bytes(const KvCacheLayout& layout, int64_t layers) {
    return layers * layout.block_stride() * static_cast<int64_t>(sizeof(float));
  }

 private:
  KvCacheLayout layout_;
  int64_t layers_, blocks_;
  FloatBuffer data_;
};

inline int64_t blocks_for(int64_t tokens) { return (tokens + kKvTile - 1) / kKvTile; }

}  // namespace hybrid
