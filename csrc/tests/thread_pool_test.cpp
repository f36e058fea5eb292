// Every task runs once, whatever the number of tasks, threads and loops; loops do not mix; nothing is lost to exceptions, forks
// and threads that sleep. Build with -DHYBRID_SANITIZE=thread to have the ordering checked as well.
#include "common/thread_pool.h"

#include <omp.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/parallel.h"
#include "tests/check.h"

using hybrid::parallel_for;
using hybrid::PoolRegion;
using hybrid::testing::expect;

namespace {

#if defined(__SANITIZE_THREAD__)
constexpr bool kOpenMpIsVisible = false;  // ThreadSanitizer does not know how libgomp's threads wait for each other
#else
constexpr bool kOpenMpIsVisible = true;
#endif

// Plain memory, so that the sanitizer sees tasks of a loop write what the caller and the next loop read.
void check_loops(int64_t loops) {
  std::vector<int64_t> runs(97);
  int64_t wrong = 0;
  for (int64_t loop = 0; loop < loops; ++loop) {
    const int64_t tasks = loop * 31 % std::ssize(runs);
    parallel_for(tasks, [&](int64_t task) { runs[task] += loop + 1; });
    for (int64_t task = 0; task < tasks; ++task) wrong += std::exchange(runs[task], 0) != loop + 1;
  }
  expect(wrong == 0, "each task of each loop runs exactly once, in its own loop");
}

void check_walks() {
  for (const int64_t count : {0, 1, 2, 7, 97}) {
    for (const int64_t shares : {1, 2, 3, 8}) {
      std::vector<int64_t> runs(count), ends(count);
      hybrid::parallel_walk(count, shares, [&](int64_t i, int64_t end) {
        runs[i] += 1;
        ends[i] = end;
      });
      bool right = true;
      for (int64_t s = 0; s < shares; ++s) {
        const int64_t end = count * (s + 1) / shares;
        for (int64_t i = count * s / shares; i < end; ++i) right &= runs[i] == 1 && ends[i] == end;
      }
      expect(right, "each piece of a walk is visited once, and its share ends where the next begins");
    }
  }
  const int64_t threads = hybrid::thread_count(), count = 16 * threads;
  std::atomic<int64_t> others{0};
  hybrid::parallel_walk(count, threads, [&](int64_t i, int64_t) {
    if (i > 0) {
      ++others;
    } else {
      while (others < count - 1) std::this_thread::yield();  // for ever, if its share waited for it
    }
  });
  expect(others == count - 1, "who is done with a share helps with the others");
}

void check_region() {
  const PoolRegion region;
  expect(hybrid::ThreadPool::current() != nullptr, "a region uses the pool");
  expect(hybrid::thread_count() == omp_get_max_threads(), "a region has as many threads as OpenMP would have");
  check_loops(20000);
  check_walks();
  std::atomic<int64_t> nested{0};
  parallel_for(8, [&](int64_t) {
    expect(hybrid::thread_count() == 1, "a task has its own thread only");
    parallel_for(5, [&](int64_t) { ++nested; });
  });
  expect(nested == 40, "nested loops run serially, and wholly");
  const PoolRegion inner;
  check_loops(10);
}

// A task that waits for another one to start would wait forever if the caller ran them all.
void check_threads_take_part() {
  const PoolRegion region;
  std::atomic<int> here{0};
  parallel_for(2, [&](int64_t) {
    ++here;
    while (here < 2) std::this_thread::yield();
  });
  expect(here == 2, "two tasks are under way at once");
}

void check_exceptions() {
  std::atomic<int64_t> ran{0};
  std::string caught;
  try {
    parallel_for(50, [&](int64_t task) {
      ++ran;
      if (task % 20 == 7) throw std::runtime_error("task failed");
    });
  } catch (const std::runtime_error& error) {
    caught = error.what();
  }
  expect(caught == "task failed", "what a task throws arrives at the caller");
  expect(ran == 50, "the loop ends before it throws");
  check_loops(50);
}

void check_two_regions_at_once() {
  const PoolRegion region;
  std::thread other([] {
    const PoolRegion second;
    expect(hybrid::ThreadPool::current() == nullptr, "the pool serves one region at a time");
    if (kOpenMpIsVisible) check_loops(200);
  });
  check_loops(2000);
  other.join();
}

void check_sleepers_wake() {
  for (int round = 0; round < 20; ++round) {
    const PoolRegion region;
    check_loops(3);
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // the others are asleep by now
    check_loops(50);
  }
}

void check_affinity_follows() {
  cpu_set_t before, one;
  sched_getaffinity(0, sizeof before, &before);
  int first = 0;
  while (!CPU_ISSET(first, &before)) ++first;
  CPU_ZERO(&one);
  CPU_SET(first, &one);
  const auto processors_seen = [] {
    const PoolRegion region;
    std::mutex mutex;
    cpu_set_t seen;
    CPU_ZERO(&seen);
    parallel_for(20, [&](int64_t) {
      cpu_set_t mine;
      sched_getaffinity(0, sizeof mine, &mine);
      const std::lock_guard lock(mutex);
      CPU_OR(&seen, &seen, &mine);
      std::this_thread::yield();
    });
    return CPU_COUNT(&seen);
  };
  expect(processors_seen() == CPU_COUNT(&before), "threads float in the mask of the process");
  sched_setaffinity(0, sizeof one, &one);
  expect(processors_seen() == 1, "threads follow a change of the mask");
  check_threads_take_part();
  check_sleepers_wake();
  sched_setaffinity(0, sizeof before, &before);
  expect(processors_seen() == CPU_COUNT(&before), "and back");
}

void check_forked_child() {
  const pid_t child = fork();
  if (child == 0) {
    check_region();
    check_threads_take_part();
    _exit(hybrid::testing::failures == 0 ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child starts threads of its own");
}

}  // namespace

int main() {
  for (const int threads : {2, 4, 3}) {
    omp_set_num_threads(threads);
    check_region();
    check_threads_take_part();
    check_two_regions_at_once();
    check_sleepers_wake();
    const PoolRegion region;
    check_exceptions();
  }
  if (kOpenMpIsVisible) check_exceptions();
  check_affinity_follows();
  if (kOpenMpIsVisible) check_forked_child();
  omp_set_num_threads(1);
  const PoolRegion region;
  expect(hybrid::ThreadPool::current() == nullptr, "one thread needs no pool");
  check_loops(100);
  return hybrid::testing::finish();
}
