// A stack of its own, and the switch to it and back: one fiber stands for one CUDA thread.
//
// The sanitizers are told of every switch. ThreadSanitizer sees each fiber as a thread, and a switch orders nothing: two fibers
// are ordered by the barriers that the runner announces, and by nothing else. So a missing barrier is a data race that it
// reports on every run, although all fibers take turns on one processor thread.
#pragma once
#include <cstddef>
#include <functional>

namespace simt {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls job on the fiber's stack. A job ends by returning, and must not throw.
  void start(std::function<void()> job);
  void resume();          // from outside: runs the job until it suspends or returns
  static void suspend();  // inside a job: back to where it was resumed
  bool finished() const { return finished_; }

 private:
  static void main_loop();

  std::function<void()> job_;
  bool finished_ = true;
  std::byte* stack_ = nullptr;
  void* context_ = nullptr;
  void* sanitizer_ = nullptr;  // AddressSanitizer's fake stack or ThreadSanitizer's fiber
};

// What orders fibers for ThreadSanitizer: everything before a release() of an object is seen after an acquire() of it.
void release(void* object);
void acquire(void* object);

}  // namespace simt
