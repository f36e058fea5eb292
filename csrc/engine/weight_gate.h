// Weights that arrive while they are in use: the layer walk waits here before it reads a part of them.
#pragma once
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace hybrid {

// Part 0 is what precedes the blocks, part i + 1 block i, part num_layers + 1 what follows them. They arrive in order.
class WeightGate {
 public:
  // `while_waiting` runs several times a second in a thread that waits; what it throws ends the wait.
  explicit WeightGate(std::function<void()> while_waiting) : while_waiting_(std::move(while_waiting)) {}

  // Called by whoever brings the weights.
  void open(int64_t part) {
    const std::lock_guard lock(mutex_);
    arrived_ = part + 1;
    changed_.notify_all();
  }
  // Nothing more will come. Throws in everyone who waits, now or later, for a part that is missing.
  void fail(const std::string& why) {
    const std::lock_guard lock(mutex_);
    failure_ = why;
    changed_.notify_all();
  }
  void close() {
    const std::lock_guard lock(mutex_);
    arrived_ = 0;
    failure_.clear();
    waited_ = 0;
  }

  void wait(int64_t part) {
    std::unique_lock lock(mutex_);
    if (arrived_ > part) return;
    const auto start = Clock::now();
    while (arrived_ <= part && failure_.empty()) {
      if (changed_.wait_for(lock, kPoll) == std::cv_status::timeout) poll(lock);
    }
    waited_ += std::chrono::duration<double>(Clock::now() - start).count();
    if (arrived_ <= part) throw std::runtime_error(failure_);
  }

  double waited_seconds() const {
    const std::lock_guard lock(mutex_);
    return waited_;
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr auto kPoll = std::chrono::milliseconds(50);

  void poll(std::unique_lock<std::mutex>& lock) {
    lock.unlock();  // whoever brings the weights may hold what while_waiting_ needs
    while_waiting_();
    lock.lock();
  }

  const std::function<void()> while_waiting_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  int64_t arrived_ = 0;  // parts
  std::string failure_;
  double waited_ = 0;  // seconds
};

}  // namespace hybrid
