// One parallel loop for every CPU kernel. Threads split outputs, never reductions, so results do not depend on their number.
#pragma once
#include <omp.h>

#include <cstdint>

namespace hybrid {

// Runs fn(task) for task in [0, tasks). Tasks are handed out one at a time: make each worth at least a few microseconds.
// The team is torch's own OpenMP team (torch.set_num_threads applies). A nested call runs serially.
template <typename Fn>
void parallel_for(int64_t tasks, const Fn& fn) {
  if (tasks <= 1 || omp_get_max_threads() == 1 || omp_in_parallel()) {
    for (int64_t task = 0; task < tasks; ++task) fn(task);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t task = 0; task < tasks; ++task) fn(task);
}

}  // namespace hybrid
