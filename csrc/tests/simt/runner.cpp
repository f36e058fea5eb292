#include "tests/simt/runner.h"

#include <algorithm>
#include <deque>
#include <list>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "tests/simt/fiber.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace simt {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kSharedBytes = size_t{227} << 10;       // of a block of sm_90 that opted in
constexpr size_t kFence = 64;                            // between two allocations
constexpr size_t kArenaBytes = kSharedBytes + 64 * kFence;
constexpr size_t kMaxCopies = 512;                       // pending in one thread
constexpr unsigned char kPoison = 0xff;                  // a NaN in every floating format, -1 as an integer

enum class State { kReady, kWaiting, kReturned };

struct Copy {
  void* to;
  const void* from;
  int bytes, zero_bytes;
  int group;
};

struct Thread {
  Fiber* fiber = nullptr;
  uint3 index{};
  int warp = 0, lane = 0;
  State state = State::kReady;
  Collective kind = Collective::kBlock;  // what it waits in
  Site site;
  std::vector<Copy> copies;
  int groups = 0;  // committed so far
};

struct Warp {
  Packet packets[2][kWarp];
  int turn = 0;          // which of the two the current exchange writes
  unsigned arrived = 0;  // lanes in the current exchange, all with the same kind and mask
  unsigned mask = 0;
  Collective kind = Collective::kWarp;
};

struct Allocation {
  const void* key;
  std::byte* memory;
};

const char* name(Collective kind) {
  switch (kind) {
    case Collective::kBlock: return "__syncthreads";
    case Collective::kWarp: return "__syncwarp";
    case Collective::kShuffle: return "a shuffle";
    case Collective::kVote: return "a vote";
    case Collective::kMatrix: return "a matrix instruction";
  }
  return "";
}

std::string place(const Site& site) {
  const std::string file = site.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
}

class Block {
 public:
  Block(dim3 shape, size_t dynamic_bytes, std::deque<Fiber>& fibers) : shape_(shape), dynamic_bytes_(dynamic_bytes) {
    count_ = shape.x * shape.y * shape.z;
    threads_.resize(count_);
    warps_.resize((count_ + kWarp - 1) / kWarp);
    while (fibers.size() < count_) fibers.emplace_back();
    fibers_ = &fibers;
    for (unsigned i = 0; i < count_; ++i) {
      threads_[i].index = {i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y};
      threads_[i].warp = static_cast<int>(i / kWarp);
      threads_[i].lane = static_cast<int>(i % kWarp);
      threads_[i].copies.reserve(kMaxCopies);
    }
  }

  // number: which block this is, counted in the order of running.
  void run(uint3 index, uint64_t number, const std::function<void()>& kernel) {
    blockIdx = index;
    kernel_ = &kernel;
    prepare_shared();
    const std::vector<unsigned> turns = turn_order();
    for (unsigned i = 0; i < count_; ++i) {
      Thread& thread = threads_[i];
      thread.state = State::kReady;
      thread.groups = 0;
      thread.copies.clear();
      // Blocks of a grid are not ordered: the same thread of the next block runs on another fiber.
      thread.fiber = &(*fibers_)[(i + number) % count_];
      thread.fiber->start([this, &thread] { run_thread(thread); });
    }
    release(this);
    for (unsigned done = 0; done < count_;) {
      bool progress = false;
      for (const unsigned i : turns) {
        if (threads_[i].state != State::kReady) continue;
        progress = true;
        resume(threads_[i]);
        if (failure_) std::rethrow_exception(failure_);
        done += threads_[i].state == State::kReturned;
      }
      if (!progress) throw Error("block " + describe(index) + ": " + standstill());
    }
  }

  // Everything that the threads did is seen by the host.
  void finish_grid() {
    acquire(&warps_);
    arenas_.clear();
  }

  void block_barrier(const Site& site) {
    Thread& thread = *current_;
    if (at_barrier_ == 0) {
      barrier_site_ = site;
    } else if (site.line() != barrier_site_.line() || place(site) != place(barrier_site_)) {
      throw Error("barrier divergence: " + describe(thread.index) + " is in __syncthreads at " + place(site) +
                  " while others are in the one at " + place(barrier_site_));
    }
    release(&at_barrier_);
    if (++at_barrier_ == count_) {
      at_barrier_ = 0;
      for (Thread& other : threads_) {
        if (other.state == State::kWaiting && other.kind == Collective::kBlock) other.state = State::kReady;
      }
    } else {
      wait(thread, Collective::kBlock, site);
    }
    acquire(&at_barrier_);
  }

  const Packet* exchange(Collective kind, unsigned mask, const Packet& mine, const Site& site) {
    Thread& thread = *current_;
    Warp& warp = warps_[thread.warp];
    const unsigned bit = 1u << thread.lane;
    if (!(mask & bit)) throw Error(place(site) + ": lane " + std::to_string(thread.lane) + " is not in its own mask");
    if (warp.arrived == 0) {
      warp.kind = kind;
      warp.mask = mask;
    } else if (warp.kind != kind || warp.mask != mask) {
      throw Error("warp divergence: " + describe(thread.index) + " is in " + name(kind) + " at " + place(site) +
                  " while lanes of its warp are in " + name(warp.kind) + " or have another mask");
    }
    const int turn = warp.turn;
    for (int i = 0; i < 4; ++i) warp.packets[turn][thread.lane].word[i] = mine.word[i];
    if (kind == Collective::kWarp) release(&warp);
    warp.arrived |= bit;
    if (warp.arrived == mask) {
      warp.arrived = 0;
      warp.turn = 1 - turn;
      for (Thread& other : threads_) {
        const bool here = other.warp == thread.warp && (mask >> other.lane & 1);
        if (here && other.state == State::kWaiting && other.kind != Collective::kBlock) other.state = State::kReady;
      }
    } else {
      wait(thread, kind, site);
    }
    if (kind == Collective::kWarp) acquire(&warp);
    return warp.packets[turn];
  }

  void* static_shared(const void* key, size_t bytes, size_t alignment, const Site& site) {
    for (const Allocation& made : allocations_) {
      if (made.key == key) return made.memory;
    }
    std::byte* memory = allocate(bytes, alignment, site);
    allocations_.push_back({key, memory});
    return memory;
  }

  void* dynamic_shared(const Site& site) {
    if (dynamic_bytes_ == 0) throw Error(place(site) + ": the launch gave no dynamic shared memory");
    return dynamic_;
  }

  Thread& current() { return *current_; }

 private:
  void run_thread(Thread& thread) {
    acquire(this);
    try {
      (*kernel_)();
      if (!thread.copies.empty()) throw Error("a thread returns while its asynchronous copies are under way");
    } catch (...) {
      failure_ = std::current_exception();
    }
    thread.state = State::kReturned;
    release(&warps_);
  }

  void resume(Thread& thread) {
    current_ = &thread;
    threadIdx = thread.index;
    thread.fiber->resume();
  }

  void wait(Thread& thread, Collective kind, const Site& site) {
    thread.state = State::kWaiting;
    thread.kind = kind;
    thread.site = site;
    release(&warps_);  // should the grid fail, the host sees what was done so far
    Fiber::suspend();
  }

  std::vector<unsigned> turn_order() const {
    std::vector<unsigned> turns(count_);
    std::iota(turns.begin(), turns.end(), 0u);
    if (order == Order::kBackward) std::reverse(turns.begin(), turns.end());
    if (order == Order::kShuffled) std::shuffle(turns.begin(), turns.end(), std::mt19937(count_));
    return turns;
  }

  // Under ThreadSanitizer every block has memory of its own, since nothing orders blocks; otherwise one arena serves all.
  void prepare_shared() {
#if defined(HYBRID_THREAD_SANITIZER)
    arenas_.emplace_back(new std::byte[kArenaBytes]);
#else
    if (arenas_.empty()) arenas_.emplace_back(new std::byte[kArenaBytes]);
#endif
    allocations_.clear();
    arena_used_ = 0;
    ASAN_UNPOISON_MEMORY_REGION(arenas_.back().get(), kArenaBytes);
    std::fill_n(arenas_.back().get(), kArenaBytes, std::byte{kPoison});
    ASAN_POISON_MEMORY_REGION(arenas_.back().get(), kArenaBytes);
    if (dynamic_bytes_ > 0) dynamic_ = allocate(dynamic_bytes_, 16, Site::current());
  }

  std::byte* allocate(size_t bytes, size_t alignment, const Site& site) {
    std::byte* base = arenas_.back().get();
    const auto address = reinterpret_cast<uintptr_t>(base) + arena_used_ + kFence;
    const uintptr_t aligned = (address + alignment - 1) / alignment * alignment;
    arena_used_ = aligned - reinterpret_cast<uintptr_t>(base) + bytes;
    if (arena_used_ + kFence > kArenaBytes) throw Error(place(site) + ": more shared memory than a block can have");
    ASAN_UNPOISON_MEMORY_REGION(reinterpret_cast<void*>(aligned), bytes);
    return reinterpret_cast<std::byte*>(aligned);
  }

  static std::string describe(uint3 i) {
    return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
  }

  // Where the threads are when none can go on: "32 threads wait in __syncthreads at norm.cuh:88, 8 have returned".
  std::string standstill() const {
    std::vector<std::pair<std::string, int>> groups;
    for (const Thread& thread : threads_) {
      const std::string where = thread.state == State::kReturned
                                    ? std::string("have returned")
                                    : std::string("wait in ") + name(thread.kind) + " at " + place(thread.site);
      const auto same = std::find_if(groups.begin(), groups.end(), [&](auto& group) { return group.first == where; });
      if (same == groups.end()) {
        groups.emplace_back(where, 1);
      } else {
        ++same->second;
      }
    }
    std::string text = "deadlock:";
    for (const auto& [where, count] : groups) text += " " + std::to_string(count) + " threads " + where + ";";
    text.pop_back();
    return text;
  }

  dim3 shape_;
  unsigned count_ = 0;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::deque<Fiber>* fibers_;
  const std::function<void()>* kernel_ = nullptr;
  Thread* current_ = nullptr;
  unsigned at_barrier_ = 0;
  Site barrier_site_;
  std::exception_ptr failure_;
  std::vector<std::unique_ptr<std::byte[]>> arenas_;
  std::vector<Allocation> allocations_;
  size_t arena_used_ = 0, dynamic_bytes_ = 0;
  std::byte* dynamic_ = nullptr;
};

Block* block = nullptr;  // the one that runs
uint64_t total_threads = 0;

void check_launch(dim3 grid, dim3 shape, size_t dynamic_bytes) {
  const bool good = grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= 2147483647u && grid.y <= 65535 &&
                    grid.z <= 65535 && shape.x >= 1 && shape.y >= 1 && shape.z >= 1 && shape.z <= 64 &&
                    shape.x * shape.y * shape.z <= kMaxThreads && dynamic_bytes <= kSharedBytes;
  if (!good) {
    throw Error("invalid launch: grid " + std::to_string(grid.x) + "x" + std::to_string(grid.y) + "x" +
                std::to_string(grid.z) + ", block " + std::to_string(shape.x) + "x" + std::to_string(shape.y) + "x" +
                std::to_string(shape.z) + ", " + std::to_string(dynamic_bytes) + " bytes of shared memory");
  }
}

}  // namespace

void run_grid(dim3 grid, dim3 shape, size_t dynamic_shared_bytes, const std::function<void()>& kernel) {
  check_launch(grid, shape, dynamic_shared_bytes);
  static auto& pools = *new std::list<std::deque<Fiber>>(1);  // the first is used by grid after grid; never destroyed
  Block runner(shape, dynamic_shared_bytes, pools.front());
  block = &runner;
  gridDim = grid;
  blockDim = shape;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  total_threads += blocks * shape.x * shape.y * shape.z;
  try {
    for (uint64_t number = 0; number < blocks; ++number) {
      const uint64_t i = order == Order::kBackward ? blocks - 1 - number : number;
      runner.run({static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                  static_cast<unsigned>(i / grid.x / grid.y)},
                 number, kernel);
    }
  } catch (...) {
    runner.finish_grid();
    pools.emplace_front();  // those that ran stand in the middle of a kernel for ever
    throw;
  }
  runner.finish_grid();
}

uint64_t threads_run() { return total_threads; }

const Packet* exchange(Collective kind, unsigned mask, const Packet& mine, const Site& site) {
  return block->exchange(kind, mask, mine, site);
}
void block_barrier(const Site& site) { block->block_barrier(site); }
int lane_index() { return block->current().lane; }

void* static_shared(const void* key, size_t bytes, size_t alignment, const Site& site) {
  return block->static_shared(key, bytes, alignment, site);
}
void* dynamic_shared(const Site& site) { return block->dynamic_shared(site); }

void copy_later(void* shared, const void* global, int bytes, int zero_bytes) {
  Thread& thread = block->current();
  if (thread.copies.size() == kMaxCopies) throw Error("too many asynchronous copies under way in one thread");
  thread.copies.push_back({shared, global, bytes, zero_bytes, thread.groups});
  std::memset(shared, kPoison, static_cast<size_t>(bytes + zero_bytes));  // it may arrive at once: what was there is gone
}

void commit_copies() { ++block->current().groups; }

void wait_for_copies(int groups_left) {
  Thread& thread = block->current();
  const int last = thread.groups - groups_left;  // groups before this one must be complete
  auto& copies = thread.copies;
  const auto end = std::find_if(copies.begin(), copies.end(), [&](const Copy& copy) { return copy.group >= last; });
  for (auto copy = copies.begin(); copy != end; ++copy) {
    std::memcpy(copy->to, copy->from, copy->bytes);
    std::memset(static_cast<std::byte*>(copy->to) + copy->bytes, 0, copy->zero_bytes);
  }
  copies.erase(copies.begin(), end);
}

void require(bool good, const char* what, const Site& site) {
  if (!good) throw Error(place(site) + ": " + what);
}
void require_alignment(const void* address, size_t bytes, const Site& site) {
  require(reinterpret_cast<uintptr_t>(address) % bytes == 0, "misaligned address", site);
}

}  // namespace simt
