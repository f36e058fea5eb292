#include "common/parallel.h"

#include <omp.h>

#include <atomic>
#include <exception>

#include "common/thread_pool.h"

namespace hybrid {
namespace {

thread_local bool inside_task = false;

// One loop over tasks. Threads may not throw across its end, so the first exception waits in it.
class Loop {
 public:
  Loop(Task task, const void* closure) : task_(task), closure_(closure) {}

  void run(int64_t i) {
    inside_task = true;
    try {
      task_(closure_, i);
    } catch (...) {
      if (!failed_.test_and_set()) error_ = std::current_exception();
    }
    inside_task = false;
  }

  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  const Task task_;
  const void* const closure_;
  std::atomic_flag failed_ = ATOMIC_FLAG_INIT;
  std::exception_ptr error_;
};

}  // namespace

int64_t thread_count() {
  if (inside_task || omp_in_parallel()) return 1;
  const ThreadPool* pool = ThreadPool::current();
  return pool != nullptr ? pool->threads() : omp_get_max_threads();
}

void run_tasks(int64_t tasks, Task task, const void* closure) {
  if (thread_count() == 1) {
    for (int64_t i = 0; i < tasks; ++i) task(closure, i);
    return;
  }
  Loop loop(task, closure);
  if (ThreadPool* pool = ThreadPool::current()) {
    pool->run(tasks, [&](int64_t i) { loop.run(i); });
  } else {
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; ++i) loop.run(i);
  }
  loop.rethrow();
}

}  // namespace hybrid
