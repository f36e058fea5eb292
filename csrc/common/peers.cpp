#include "common/peers.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <thread>

namespace hybrid {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kLine = 64;
constexpr int64_t kFloats = 256 * 1024;            // of a message: longer ones go in pieces
constexpr auto kSpin = std::chrono::microseconds(100);  // then to sleep, as threads of the pool do
constexpr long kPollNanoseconds = 50'000'000;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Not std::atomic::wait: that one is private to a process.
void sleep_while(std::atomic<uint32_t>& bell, uint32_t value) {
  const timespec limit{0, kPollNanoseconds};
  syscall(SYS_futex, &bell, FUTEX_WAIT, value, &limit, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>& bell) { syscall(SYS_futex, &bell, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0); }

}  // namespace

struct Peers::Header {
  std::atomic<uint64_t> posted;   // position of the last message
  std::atomic<uint64_t> left_at;  // where the rollout began that this rank left, 0 at first
  std::atomic<uint32_t> bell;     // changes with either
  std::atomic<uint32_t> sleepers;

  void ring() {
    ++bell;
    if (sleepers.load() > 0) wake_all(bell);
  }
};
static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

int64_t Peers::bytes_for(int64_t ranks) { return ranks * (kLine + 2 * kFloats * static_cast<int64_t>(sizeof(float))); }

Peers::Peers(std::byte* memory, int64_t rank, int64_t ranks, int64_t first_rank, double timeout,
             std::function<void()> while_waiting)
    : memory_(memory),
      rank_(rank),
      ranks_(ranks),
      first_rank_(first_rank),
      timeout_(timeout),
      while_waiting_(std::move(while_waiting)) {
  static_assert(sizeof(Header) <= kLine);
}

Peers::Header& Peers::header(int64_t rank) const { return *reinterpret_cast<Header*>(memory_ + rank * kLine); }

float* Peers::buffer(int64_t rank) const {
  float* buffers = reinterpret_cast<float*>(memory_ + ranks_ * kLine);
  return buffers + (2 * rank + static_cast<int64_t>(position_ % 2)) * kFloats;
}

void Peers::begin(uint64_t position) { begun_at_ = position_ = position; }

void Peers::leave() {
  header(rank_).left_at = begun_at_;
  header(rank_).ring();
}

float* Peers::next_message() {
  ++position_;
  return buffer(rank_);
}

void Peers::post() {
  header(rank_).posted = position_;
  header(rank_).ring();
}

void Peers::await(int64_t rank) {
  Header& peer = header(rank);
  const auto arrived = [&] { return peer.posted.load(std::memory_order_acquire) >= position_; };
  if (arrived()) return;
  const auto start = Clock::now();
  while (Clock::now() - start < kSpin) {
    if (arrived()) return;
    std::this_thread::yield();  // the other rank may want this very core
  }
  for (;;) {
    ++peer.sleepers;
    const uint32_t bell = peer.bell;
    const bool sleep = !arrived() && peer.left_at != begun_at_;
    if (sleep) sleep_while(peer.bell, bell);
    --peer.sleepers;
    if (arrived()) return;
    poll(rank, seconds_since(start));
  }
}

void Peers::poll(int64_t rank, double waited) const {
  const std::string who = "rank " + std::to_string(first_rank_ + rank);
  if (header(rank).left_at == begun_at_) {
    throw PeerLost(who + " left the rollout that this rank shares with it (tensor-parallel generation); look at that " +
                   "rank's output for the cause");
  }
  if (waited > timeout_) {
    throw PeerLost("rank " + std::to_string(first_rank_ + rank_) + " waited " +
                   std::to_string(static_cast<int64_t>(timeout_)) + " s at 'tensor-parallel generation' for " + who +
                   "; look at that rank's output for the cause");
  }
  while_waiting_();
}

// Whoever is next to this rank first: not all read the same buffer at once.
template <typename Read>
void Peers::from_the_others(const Read& read) {
  post();
  for (int64_t step = 1; step < ranks_; ++step) {
    const int64_t other = (rank_ + step) % ranks_;
    await(other);
    read(other, static_cast<const float*>(buffer(other)));
  }
}

void Peers::share_columns(const float* mine, int64_t stride, float* matrix, int64_t rows,
                          const std::vector<int64_t>& begins) {
  const auto width = [&](int64_t rank) { return begins[rank + 1] - begins[rank]; };
  const int64_t row_stride = begins.back();
  int64_t widest = 1;
  for (int64_t rank = 0; rank < ranks_; ++rank) widest = std::max(widest, width(rank));
  if (widest > kFloats) throw std::logic_error("Peers::share_columns: a row does not fit a message");
  const int64_t most = kFloats / widest;
  for (int64_t first = 0; first < rows; first += most) {
    const int64_t count = std::min(most, rows - first);
    float *own = next_message(), *block = matrix + first * row_stride;
    for (int64_t row = 0; row < count; ++row) {
      const float* from = mine + (first + row) * stride;
      float* to = block + row * row_stride + begins[rank_];
      std::copy_n(from, width(rank_), own + row * width(rank_));
      if (from != to) std::copy_n(from, width(rank_), to);
    }
    from_the_others([&](int64_t other, const float* message) {
      for (int64_t row = 0; row < count; ++row) {
        std::copy_n(message + row * width(other), width(other), block + row * row_stride + begins[other]);
      }
    });
  }
}

void Peers::share_rows(float* matrix, int64_t width, std::span<const int32_t> owners) {
  if (width > kFloats) throw std::logic_error("Peers::share_rows: a row does not fit a message");
  const auto most = static_cast<size_t>(kFloats / width);
  for (size_t first = 0; first < owners.size(); first += most) {
    const size_t end = std::min(first + most, owners.size());
    float* to = next_message();
    for (size_t row = first; row < end; ++row) {
      if (owners[row] == rank_) to = std::copy_n(matrix + static_cast<int64_t>(row) * width, width, to);
    }
    from_the_others([&](int64_t other, const float* from) {
      for (size_t row = first; row < end; ++row) {
        if (owners[row] != other) continue;
        std::copy_n(from, width, matrix + static_cast<int64_t>(row) * width);
        from += width;
      }
    });
  }
}

bool Peers::any(bool mine) {
  *next_message() = mine ? 1.0f : 0.0f;
  bool found = mine;
  from_the_others([&](int64_t, const float* said) { found |= *said != 0.0f; });
  return found;
}

}  // namespace hybrid
