// Bytes of working memory that kernels keep between calls, over all threads: part of what a rollout declares to use.
#pragma once
#include <atomic>
#include <cstdint>

namespace hybrid {

inline std::atomic<int64_t> kernel_memory_bytes{0};

}  // namespace hybrid
