// Runs a grid of CUDA threads on the host, a fiber for each thread of a block, block after block.
//
// What it promises, and what a GPU does not: the same order every time (of one's choice), memory full of NaN before it is
// written, asynchronous copies that overwrite at once and arrive as late as the documentation allows, and an error, with the places
// of the threads, for every collective that not all of its threads reach. It runs one warp instruction as 32 separate ones, in some
// order: a kernel that relies on lanes being in step is wrong here as it is on a GPU.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>

#include "tests/simt/language.h"

namespace simt {

// A kernel broke a rule of CUDA; the message says which threads stood where.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The order in which blocks, and threads of a block, take turns. A result must not depend on it.
enum class Order { kForward, kBackward, kShuffled };
inline Order order = Order::kForward;

// Runs the kernel (called once for each thread). Throws Error, also for a launch that CUDA would refuse.
void run_grid(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& kernel);

// Threads run since the program started, of all grids: for the tests' summary.
uint64_t threads_run();

}  // namespace simt
