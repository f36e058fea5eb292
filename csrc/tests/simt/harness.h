// What the kernel tests share: arrays at odd addresses full of NaN, seeded numbers, the accuracy rule, the figures (printed, and
// written for figures.py).
//
// The rule: against the fp64 reference, at most twice the error of the plain torch expression in the same dtype, plus one unit in
// the last place of the largest result, since the plain expression may hit the exact value by luck. A reference is a template
// over Exact (double throughout) and Plain<T> (float, each torch operator's result rounded to T).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "common/numeric.cuh"
#include "tests/check.h"
#include "tests/simt/runner.h"

namespace hybrid::testing {

using cuda::round_to;
using cuda::to_float;

// An array that is exactly as long as it says (AddressSanitizer guards both ends) and starts `shift` elements after a multiple of
// 16 bytes. Full of NaN (all bits set) until written.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size, int64_t shift = 0) : size_(size), shift_(shift) {
    const size_t bytes = static_cast<size_t>(size + shift) * sizeof(T);
    memory_.reset(static_cast<std::byte*>(std::malloc(bytes > 0 ? bytes : 1)));
    poison();
  }

  T* data() { return reinterpret_cast<T*>(memory_.get()) + shift_; }
  const T* data() const { return reinterpret_cast<const T*>(memory_.get()) + shift_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }

  void poison() { std::fill_n(memory_.get(), (size_ + shift_) * sizeof(T), std::byte{0xff}); }
  bool same_bits(const Buffer& other) const {
    return size_ == other.size_ && std::memcmp(data(), other.data(), size_ * sizeof(T)) == 0;
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  int64_t size_, shift_;
  std::unique_ptr<std::byte, Free> memory_;
};

// SplitMix64: the same numbers everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  double normal() {  // the sum of twelve uniforms: good enough for tests
    double sum = -6.0;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }
  template <typename T>
  void fill(Buffer<T>& out, double scale = 1.0, double shift = 0.0) {
    for (int64_t i = 0; i < out.size(); ++i) out[i] = round_to<T>(static_cast<float>(scale * normal() + shift));
  }

 private:
  uint64_t state_;
};

struct Exact {
  using Real = double;
  static double round(double x) { return x; }
};
template <typename T>
struct Plain {
  using Real = float;
  static float round(float x) { return cuda::rounded<T>(x); }
};

template <typename T>
constexpr double kUlp = std::is_same_v<T, float> ? 0x1p-23 : std::is_same_v<T, f16> ? 0x1p-10 : 0x1p-7;
template <typename T>
constexpr const char* kTypeName = std::is_same_v<T, float> ? "fp32" : std::is_same_v<T, f16> ? "fp16" : "bf16";

// The file that HYBRID_SIMT_FIGURES names, written anew, or nullptr.
inline std::FILE* figures() {
  static std::FILE* const file = [] {
    const char* path = std::getenv("HYBRID_SIMT_FIGURES");
    return path != nullptr ? std::fopen(path, "w") : nullptr;
  }();
  return file;
}

// Figures of results that equal the reference bit for bit. `kernel`: the operator's name, then what one likes, then the type.
inline void report_exact(const std::string& kernel, int results) {
  std::printf("%-28s %4d results, equal bit for bit\n", kernel.c_str(), results);
  if (figures() != nullptr) std::fprintf(figures(), "results\t%s\t%d\texact\n", kernel.c_str(), results);
}

// Errors of one kernel (named as in report_exact()) over all its cases, relative to the largest exact value of each. The figure leaves out results of fewer than
// `least` elements, which may cancel to nearly nothing (the gradient of a norm over one column); they are checked all the same.
class Accuracy {
 public:
  explicit Accuracy(std::string kernel, size_t least = 16) : kernel_(std::move(kernel)), least_(least) {}

  template <typename T>
  void check(const Buffer<T>& actual, const std::vector<double>& exact, const std::vector<double>& plain,
             const std::string& what) {
    double largest = 0.0, error = 0.0, plain_error = 0.0;
    for (size_t i = 0; i < exact.size(); ++i) {
      largest = std::max(largest, std::abs(exact[i]));
      plain_error = std::max(plain_error, std::abs(plain[i] - exact[i]));
      const double distance = std::abs(static_cast<double>(to_float(actual[i])) - exact[i]);
      error = distance <= error ? error : distance;  // a NaN stays
    }
    ++cases_;
    const double allowed = 2.0 * plain_error + kUlp<T> * largest;
    if (!(error <= allowed)) {
      std::fprintf(stderr, "%s %s: error %.3e, allowed %.3e\n", kernel_.c_str(), what.c_str(), error, allowed);
      expect(false, "accuracy");
    }
    if (largest > 0.0 && exact.size() >= least_) {
      worst_ = std::max(worst_, error / largest);
      worst_plain_ = std::max(worst_plain_, plain_error / largest);
    }
  }

  ~Accuracy() {
    std::printf("%-28s %4d results, worst relative error %.2e (plain expression %.2e)\n", kernel_.c_str(), cases_,
                worst_, worst_plain_);
    if (figures() != nullptr) std::fprintf(figures(), "results\t%s\t%d\t%.3e\n", kernel_.c_str(), cases_, worst_);
  }

 private:
  std::string kernel_;
  size_t least_;
  int cases_ = 0;
  double worst_ = 0.0, worst_plain_ = 0.0;
};

// A problem size; `shift` moves every array off the 16-byte boundary by that many elements.
struct GridCase {
  int64_t rows, cols, shift = 0;
  std::string name() const {
    return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "] shift " + std::to_string(shift);
  }
};

inline bool is_set_to(const char* variable, const char* value) {
  const char* set = std::getenv(variable);
  return set != nullptr && std::strcmp(set, value) == 0;
}

// Whether the slow, instrumented builds run a part of the grid only: HYBRID_SIMT_GRID=full asks for all.
inline bool full_grid() { return is_set_to("HYBRID_SIMT_GRID", "full"); }

// Runs fn in every order of threads and blocks; the results that it returns must not differ by a bit. One order is enough for
// ThreadSanitizer, which knows what is ordered and what is not, and for who asks by HYBRID_SIMT_ORDERS=one.
template <typename Fn>
auto in_every_order([[maybe_unused]] const std::string& what, const Fn& fn) {
  simt::order = simt::Order::kForward;
  auto first = fn();
#if !defined(HYBRID_THREAD_SANITIZER)
  if (is_set_to("HYBRID_SIMT_ORDERS", "one")) return first;
  for (const simt::Order order : {simt::Order::kBackward, simt::Order::kShuffled}) {
    simt::order = order;
    const auto again = fn();
    for (size_t i = 0; i < first.size(); ++i) {
      if (first[i].same_bits(again[i])) continue;
      std::fprintf(stderr, "%s: result %zu depends on the order of threads\n", what.c_str(), i);
      expect(false, "determinism");
    }
  }
  simt::order = simt::Order::kForward;
#endif
  return first;
}

template <typename Fn>
void for_each_type(const Fn& fn) {
  fn(float{});
  fn(f16{});
  fn(bf16{});
}

// The last line of a test program, and its exit code.
inline int finish_simt(const char* family) {
  const auto threads = static_cast<unsigned long long>(simt::threads_run());
  std::printf("%s: %d failures, %llu threads run\n", family, failures, threads);
  if (figures() != nullptr) std::fprintf(figures(), "program\t%s\t%d\t%llu\n", family, failures, threads);
  return finish();
}

}  // namespace hybrid::testing
