// Weights that arrive while they are in use: the layer walk waits here before it reads a part of them, and says when it is
// through with a part whose place another one takes.
#pragma once
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace hybrid {

// Part 0 is what precedes the blocks, part i + 1 block i, part num_layers + 1 what follows them. A part is pinned: once
// there, it stays; or streamed: it comes anew for every pass, into a place that it shares with others. The streamed parts
// of one pass after another are brought in rounds, whether or not this rank is in a rollout: one that begins in the middle
// of a round reads from the next round on, and what arrives while nobody reads is dropped.
class WeightGate {
 public:
  // `while_waiting` runs several times a second in a thread that waits for a part; what it throws ends the wait.
  WeightGate(std::function<void()> while_waiting, std::set<int64_t> streamed)
      : while_waiting_(std::move(while_waiting)), streamed_(std::move(streamed)) {}

  // Called by whoever brings the weights.

  void open(int64_t part) {
    const std::lock_guard lock(mutex_);
    if (!is_streamed(part) || delivering_) there_.insert(part);
    changed_.notify_all();
  }
  // Returns when the layer walk is through with a streamed part, so that its place may be overwritten.
  void await_release(int64_t part) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return !there_.contains(part); });
  }
  // The rollout that is in progress, 0 where there is none. It waits for the first one up to `patience` seconds.
  int64_t reader(double patience) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, std::chrono::duration<double>(patience), [&] { return rollout_ != 0 || left_; });
    return rollout_;
  }
  // A round of the streamed parts begins, for `rollout`, if it is still in progress.
  void begin_round(int64_t rollout) {
    const std::lock_guard lock(mutex_);
    delivering_ = rollout_ != 0 && rollout_ == rollout;
  }
  // Whether a rollout reads the present round.
  bool delivering() const {
    const std::lock_guard lock(mutex_);
    return delivering_;
  }
  // Nothing more will come. Throws in everyone who waits, now or later, for a part that is missing.
  void fail(const std::string& why) {
    const std::lock_guard lock(mutex_);
    failure_ = why;
    changed_.notify_all();
  }
  void close() {
    const std::lock_guard lock(mutex_);
    there_.clear();
    failure_.clear();
    left_ = delivering_ = false;
    rollout_ = 0;
    waited_ = 0;
  }

  // Called by the layer walk.

  // A rollout begins. Its number is not 0, and another than that of the last.
  void enter(int64_t rollout) {
    const std::lock_guard lock(mutex_);
    rollout_ = rollout;
    changed_.notify_all();
  }
  // The rollout has ended, in whatever way, or there will be none.
  void leave() {
    const std::lock_guard lock(mutex_);
    rollout_ = 0;
    delivering_ = false;
    left_ = true;
    for (const int64_t part : streamed_) there_.erase(part);
    changed_.notify_all();
  }
  void wait(int64_t part) {
    std::unique_lock lock(mutex_);
    if (there_.contains(part)) return;
    const auto start = Clock::now();
    while (!there_.contains(part) && failure_.empty()) {
      if (changed_.wait_for(lock, kPoll) == std::cv_status::timeout) poll(lock);
    }
    waited_ += std::chrono::duration<double>(Clock::now() - start).count();
    if (!there_.contains(part)) throw std::runtime_error(failure_);
  }
  // The layer walk reads the part no more in this pass.
  void release(int64_t part) {
    if (!is_streamed(part)) return;
    const std::lock_guard lock(mutex_);
    there_.erase(part);
    changed_.notify_all();
  }

  bool is_streamed(int64_t part) const { return streamed_.contains(part); }
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
  const std::set<int64_t> streamed_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::set<int64_t> there_;
  int64_t rollout_ = 0;      // in progress
  bool delivering_ = false;  // it reads the present round
  bool left_ = false;        // one has ended, or none will come
  std::string failure_;
  double waited_ = 0;  // seconds
};

// A rollout's stay at the gate, if there is one.
class GateVisit {
 public:
  GateVisit(WeightGate* gate, int64_t rollout) : gate_(gate) {
    if (gate_ != nullptr) gate_->enter(rollout);
  }
  ~GateVisit() {
    if (gate_ != nullptr) gate_->leave();
  }
  GateVisit(const GateVisit&) = delete;
  GateVisit& operator=(const GateVisit&) = delete;

 private:
  WeightGate* gate_;
};

}  // namespace hybrid
