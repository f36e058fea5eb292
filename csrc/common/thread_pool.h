// Threads that stay awake between parallel loops.
//
// A decode step is hundreds of short loops. An OpenMP region costs microseconds at its fork and its join, and waits there
// for every thread, even one that the operating system has put aside. Here a loop costs one store to start and one load to
// end, and ends when its tasks are done: a thread that comes late finds nothing left and holds nobody up.
#pragma once
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

namespace hybrid {

class ThreadPool {
 public:
  // The pool whose region the calling thread is in, or nullptr.
  static ThreadPool* current();

  // Runs task(i) for i in [0, tasks) on the region's threads and the caller; only from the thread of the region. Tasks throw
  // nothing (parallel_for sees to that) and number less than 2^32 - 1.
  void run(int64_t tasks, const std::function<void(int64_t)>& task);

  // Of the region, the caller included.
  int64_t threads() const { return threads_.load(std::memory_order_relaxed); }

 private:
  friend class PoolRegion;

  static ThreadPool& instance();
  bool enter(int64_t threads);
  void leave();
  void follow_affinity();
  void start_worker();
  void work(int64_t worker);
  bool work_on(uint64_t ticket);
  void publish(uint64_t ticket);

  static constexpr uint64_t kNothingLeft = 0xffffffff;

  // What is being run. The ticket holds the loop's number above, and the next task to hand out below. Whoever moves the
  // ticket on by compare-and-swap owns that task, and knows that the fields it has read belong to the same loop: they are
  // rewritten only while the ticket says that nothing is left.
  alignas(64) std::atomic<uint64_t> ticket_{kNothingLeft};
  std::atomic<const std::function<void(int64_t)>*> task_{nullptr};
  std::atomic<int64_t> tasks_{0};
  alignas(64) std::atomic<int64_t> finished_{0};  // tasks of this loop
  alignas(64) std::atomic<int64_t> threads_{1};   // 1 outside of regions
  std::atomic<int> spins_{0};                     // before sleeping, in this region
  std::atomic<uint32_t> parked_{0};               // threads asleep until the ticket changes
  std::atomic<bool> taken_{false};
  std::vector<pthread_t> workers_;
  cpu_set_t affinity_;  // of the workers, unless OpenMP binds threads to places
};

// While one lives, parallel_for on this thread runs on the pool. Open one around a phase in which nothing else computes:
// torch's OpenMP threads, which sleep a moment after their last loop, and the pool's would compete for the cores.
//
// The threads number what OpenMP would use here (OMP_NUM_THREADS, torch.set_num_threads), and sit where OpenMP would put them
// (OMP_PROC_BIND, OMP_PLACES: for example OMP_PROC_BIND=close with OMP_PLACES=cores keeps them on as few sockets as they
// need); otherwise they float in the affinity mask of the thread that opens the region. Between loops they spin for a while,
// then sleep; outside of regions they sleep. When another thread is in a region, this one does nothing and OpenMP serves.
class PoolRegion {
 public:
  PoolRegion();
  ~PoolRegion();
  PoolRegion(const PoolRegion&) = delete;
  PoolRegion& operator=(const PoolRegion&) = delete;

 private:
  bool entered_;
};

}  // namespace hybrid
