// Working memory of one thread, kept between calls: kernels ask for it in every task.
#pragma once
#include <cstdint>

namespace hybrid {

// At least `floats` floats, aligned to a cache line, uninitialised, valid until this thread's next call with the same slot.
// A kernel that calls another kernel inside a task gives it a slot of its own.
enum class ScratchSlot { kLinear, kLinearTiles, kAttention, kAttentionSplit, kHead, kCount };
float* thread_scratch(ScratchSlot slot, int64_t floats);

}  // namespace hybrid
