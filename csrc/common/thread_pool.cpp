#include "common/thread_pool.h"

#include <omp.h>
#include <signal.h>

#include <thread>

namespace hybrid {
namespace {

// Some 100 microseconds: longer than the serial pieces of a decode step, shorter than anyone notices.
constexpr int kSpins = 4000;
constexpr int kSpinsBetweenYields = 64;

thread_local ThreadPool* region_pool = nullptr;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waiting for what is usually about to happen. The core is offered to others every so often: on a machine with more busy
// threads than cores, who is waited for may be among them.
class Patience {
 public:
  explicit Patience(int spins) : left_(spins) {}

  // False once it is time to sleep.
  bool spin() {
    if (--left_ < 0) return false;
    left_ % kSpinsBetweenYields == 0 ? static_cast<void>(sched_yield()) : pause();
    return true;
  }

 private:
  int left_;
};

bool bound_by_openmp() { return omp_get_proc_bind() != omp_proc_bind_false && omp_get_num_places() > 0; }

// Where OpenMP binds its threads, ours go to the same places, in their order.
void take_place(int64_t worker) {
  const int place = static_cast<int>(worker % omp_get_num_places());
  std::vector<int> processors(omp_get_place_num_procs(place));
  omp_get_place_proc_ids(place, processors.data());
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int processor : processors) CPU_SET(processor, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // a place that is gone since start-up leaves the thread floating
}

// Signals are for the threads that the process knows of: a Ctrl-C must not land in a worker, which inherits this mask.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

std::atomic<ThreadPool*> the_pool{nullptr};

}  // namespace

ThreadPool* ThreadPool::current() { return region_pool; }

// Never destroyed: its threads may be asleep in it when the process exits. A forked child has none of them, so it starts anew.
ThreadPool& ThreadPool::instance() {
  static const int in_children = pthread_atfork(nullptr, nullptr, [] { the_pool = nullptr; });
  static_cast<void>(in_children);
  ThreadPool* pool = the_pool;
  if (pool == nullptr) {
    auto* fresh = new ThreadPool;
    if (the_pool.compare_exchange_strong(pool, fresh)) return *fresh;
    delete fresh;  // another thread was first
  }
  return *pool;
}

bool ThreadPool::enter(int64_t threads) {
  if (threads <= 1 || taken_.exchange(true, std::memory_order_acquire)) return false;
  try {
    follow_affinity();
    workers_.reserve(threads);
    while (std::ssize(workers_) + 1 < threads) start_worker();
  } catch (...) {  // the system allows no more threads
    taken_.store(false, std::memory_order_release);
    throw;
  }
  spins_.store(threads <= omp_get_num_procs() ? kSpins : kSpinsBetweenYields, std::memory_order_relaxed);
  threads_.store(threads, std::memory_order_release);
  threads_.notify_all();
  return true;
}

void ThreadPool::leave() {
  threads_.store(1, std::memory_order_relaxed);
  taken_.store(false, std::memory_order_release);
}

// New threads inherit the mask of this one; those that exist are given it when it has changed.
void ThreadPool::follow_affinity() {
  if (bound_by_openmp()) return;
  cpu_set_t now;
  if (pthread_getaffinity_np(pthread_self(), sizeof now, &now) != 0) return;  // more processors than a set can name
  if (!workers_.empty() && CPU_EQUAL(&now, &affinity_)) return;
  for (const pthread_t worker : workers_) pthread_setaffinity_np(worker, sizeof now, &now);
  affinity_ = now;
}

void ThreadPool::start_worker() {
  const SignalsBlocked blocked;
  std::thread thread(&ThreadPool::work, this, std::ssize(workers_) + 1);
  workers_.push_back(thread.native_handle());
  thread.detach();
}

void ThreadPool::publish(uint64_t ticket) {
  ticket_.store(ticket, std::memory_order_seq_cst);  // before parked_ is read: a thread going to sleep sees one or the other
  if (parked_.load(std::memory_order_seq_cst) > 0) ticket_.notify_all();
}

void ThreadPool::run(int64_t tasks, const std::function<void(int64_t)>& task) {
  const uint64_t loop = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
  // Release here and acquire in work_on: who reads one of these must also see that the loop before was closed.
  task_.store(&task, std::memory_order_release);
  tasks_.store(tasks, std::memory_order_release);
  finished_.store(0, std::memory_order_relaxed);
  publish(loop << 32);
  while (work_on(ticket_.load(std::memory_order_acquire))) {
  }
  Patience patience(spins_.load(std::memory_order_relaxed));
  for (int64_t done; (done = finished_.load(std::memory_order_acquire)) != tasks;) {
    if (!patience.spin()) finished_.wait(done, std::memory_order_acquire);
  }
  ticket_.store(loop << 32 | kNothingLeft, std::memory_order_seq_cst);  // closed before the next loop writes its fields
}

// Takes one task of the loop that `ticket` names and runs it; false when nothing is left.
bool ThreadPool::work_on(uint64_t ticket) {
  for (;;) {
    const uint64_t next = ticket & kNothingLeft;
    const int64_t tasks = tasks_.load(std::memory_order_acquire);
    if (next == kNothingLeft || static_cast<int64_t>(next) >= tasks) return false;
    const std::function<void(int64_t)>* task = task_.load(std::memory_order_acquire);
    if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
    (*task)(static_cast<int64_t>(next));
    if (finished_.fetch_add(1, std::memory_order_acq_rel) + 1 == tasks) finished_.notify_one();
    return true;
  }
}

void ThreadPool::work(int64_t worker) {
  if (bound_by_openmp()) take_place(worker);
  for (;;) {
    for (int64_t threads; (threads = threads_.load(std::memory_order_acquire)) <= worker;) threads_.wait(threads);
    const int spins = spins_.load(std::memory_order_relaxed);
    Patience patience(spins);
    while (worker < threads_.load(std::memory_order_relaxed)) {
      const uint64_t seen = ticket_.load(std::memory_order_acquire);
      if (work_on(seen)) {
        patience = Patience(spins);
      } else if (!patience.spin()) {
        parked_.fetch_add(1, std::memory_order_seq_cst);
        ticket_.wait(seen, std::memory_order_seq_cst);
        parked_.fetch_sub(1, std::memory_order_relaxed);
        patience = Patience(spins);
      }
    }
  }
}

PoolRegion::PoolRegion() : entered_(false) {
  if (region_pool != nullptr || omp_in_parallel()) return;
  ThreadPool& pool = ThreadPool::instance();
  entered_ = pool.enter(omp_get_max_threads());
  if (entered_) region_pool = &pool;
}

PoolRegion::~PoolRegion() {
  if (!entered_) return;
  region_pool->leave();
  region_pool = nullptr;
}

}  // namespace hybrid
