// What the ranks of one tensor-parallel group tell each other while they generate: through memory that they share, so a
// message costs a copy and a few cache misses, where a socket and the threads behind it cost tens of microseconds.
//
// All ranks make the same calls in the same order. Each has two buffers that the others read, used in turn: before a rank
// writes to one again, every other has posted the message between, and so has read this one.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace hybrid {

// Another rank of the group has left the rollout, or does not come.
class PeerLost : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Peers {
 public:
  // Bytes of shared memory, zero at first and at a cache line, for so many ranks.
  static int64_t bytes_for(int64_t ranks);

  // This is rank `rank` of `ranks`; messages name rank `first_rank + r` for rank r. A rank that waits longer than
  // `timeout` seconds throws PeerLost. `while_waiting` runs several times a second in a long wait; what it throws ends it.
  Peers(std::byte* memory, int64_t rank, int64_t ranks, int64_t first_rank, double timeout,
        std::function<void()> while_waiting);

  int64_t rank() const { return rank_; }
  int64_t ranks() const { return ranks_; }
  int64_t bytes() const { return bytes_for(ranks_); }

  // A rollout begins at one number on all ranks, greater than position() was on any of them, after a barrier.
  void begin(uint64_t position);
  uint64_t position() const { return position_; }
  // Where the rollout began that is in progress: its name on all ranks.
  uint64_t begun_at() const { return begun_at_; }
  // This rank ends the rollout that has begun: who waits for it in vain throws PeerLost.
  void leave();

  // matrix [rows, begins.back()] of floats: columns [begins[r], begins[r + 1]) come from rank r, this rank's from `mine`
  // with its row stride, which may be their place in the matrix.
  void share_columns(const float* mine, int64_t stride, float* matrix, int64_t rows, const std::vector<int64_t>& begins);
  // matrix [owners.size(), width] of floats: row i comes from rank owners[i].
  void share_rows(float* matrix, int64_t width, std::span<const int32_t> owners);
  // Whether any rank says so.
  bool any(bool mine);

 private:
  struct Header;
  Header& header(int64_t rank) const;
  float* buffer(int64_t rank) const;  // of the message at position_
  float* next_message();
  void post();
  void await(int64_t rank);
  void poll(int64_t rank, double waited) const;
  template <typename Read>
  void from_the_others(const Read& read);

  std::byte* memory_;
  int64_t rank_, ranks_, first_rank_;
  double timeout_;
  std::function<void()> while_waiting_;
  uint64_t position_ = 0, begun_at_ = 0;
};

}  // namespace hybrid
