// One parallel loop for every CPU kernel. Threads split outputs; where they share a sum, its parts and their order are fixed
// (attention's key tiles). So results do not depend on their number.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>

namespace hybrid {

// Threads that a parallel_for here would use: those of the pool inside a PoolRegion (common/thread_pool.h), else those of
// torch's own OpenMP team (torch.set_num_threads applies); one inside a task, whose own loops run serially.
int64_t thread_count();

using Task = void (*)(const void* closure, int64_t task);

// Runs task(closure, i) for i in [0, tasks); the first exception, if any, is thrown here once all tasks have ended.
void run_tasks(int64_t tasks, Task task, const void* closure);

// Runs fn(task) for task in [0, tasks). Tasks are handed out one at a time: make each worth at least a few microseconds.
template <typename Fn>
void parallel_for(int64_t tasks, const Fn& fn) {
  if (tasks == 1) {
    fn(0);
  } else if (tasks > 1) {
    run_tasks(tasks, [](const void* fn, int64_t task) { (*static_cast<const Fn*>(fn))(task); }, &fn);
  }
}

// Runs fn(own, i, end) for i in [0, count), in `shares` runs of neighbours. A thread walks through one in order, so that it knows
// what it will read next (i + 1, if that is below the share's `end`), and memory sees a stream from each; then it helps with
// the others, so that nobody waits for a thread that came late. `own` is what prepare() returned to the thread at its start.
template <typename Prepare, typename Fn>
void parallel_walk(int64_t count, int64_t shares, const Prepare& prepare, const Fn& fn) {
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const auto walks = std::make_unique<Share[]>(shares);
  for (int64_t s = 0; s < shares; ++s) {
    walks[s].next.store(count * s / shares, std::memory_order_relaxed);
    walks[s].end = count * (s + 1) / shares;
  }
  parallel_for(shares, [&](int64_t first) {
    auto own = prepare();
    for (int64_t s = 0; s < shares; ++s) {
      Share& walk = walks[(first + s) % shares];
      for (int64_t i; (i = walk.next.fetch_add(1, std::memory_order_relaxed)) < walk.end;) fn(own, i, walk.end);
    }
  });
}

// The same for threads that need nothing of their own: fn(i, end).
template <typename Fn>
void parallel_walk(int64_t count, int64_t shares, const Fn& fn) {
  struct Nothing {};
  parallel_walk(count, shares, [] { return Nothing(); }, [&](Nothing, int64_t i, int64_t end) { fn(i, end); });
}

}  // namespace hybrid
