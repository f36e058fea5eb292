// Sums of several terms over a long array: a block adds one chunk, then one block adds the chunks. No atomics, one order.
#pragma once
#include "common/launch.cuh"
#include "common/reduce.cuh"

namespace hybrid::cuda {

constexpr int kSumThreads = 256;

template <int kTerms>
struct Sums {
  double value[kTerms];
};

struct Larger {
  __device__ double operator()(double a, double b) const { return a < b || b != b ? b : a; }  // a NaN stays
};

// Adds term by term; of the last term the largest is kept if kLastIsMax (it starts at 0).
template <int kTerms, bool kLastIsMax>
struct JoinSums {
  static __device__ __forceinline__ void into(Sums<kTerms>& total, const Sums<kTerms>& part) {
#pragma unroll
    for (int k = 0; k < kTerms; ++k) {
      const bool keep_max = kLastIsMax && k == kTerms - 1;
      total.value[k] = keep_max ? Larger{}(total.value[k], part.value[k]) : total.value[k] + part.value[k];
    }
  }
  static __device__ __forceinline__ Sums<kTerms> over_block(const Sums<kTerms>& mine) {
    BlockReducer<double> reduce;
    Sums<kTerms> total;
#pragma unroll
    for (int k = 0; k < kTerms; ++k) {
      const bool keep_max = kLastIsMax && k == kTerms - 1;
      total.value[k] = keep_max ? reduce(mine.value[k], 0.0, Larger{}) : reduce(mine.value[k]);
    }
    return total;
  }
};

// Term has kTerms, kLastIsMax and `void add(int64_t i, Sums<kTerms>& total) const`, called once for each i of [0, count).
template <typename Term>
__global__ void __launch_bounds__(kSumThreads)
    sum_chunks_kernel(Term term, int64_t count, int64_t chunk, Sums<Term::kTerms>* partial) {
  using Join = JoinSums<Term::kTerms, Term::kLastIsMax>;
  const int64_t begin = blockIdx.x * chunk;
  const int64_t end = smaller(begin + chunk, count);
  Sums<Term::kTerms> total{};
  for (int64_t i = begin + threadIdx.x; i < end; i += kSumThreads) term.add(i, total);
  total = Join::over_block(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// Finish: `void operator()(const Sums<kTerms>&) const`, called by one thread.
template <typename Term, typename Finish>
__global__ void __launch_bounds__(kSumThreads)
    join_chunks_kernel(const Sums<Term::kTerms>* partial, int64_t chunks, Finish finish) {
  using Join = JoinSums<Term::kTerms, Term::kLastIsMax>;
  Sums<Term::kTerms> total{};
  for (int64_t i = threadIdx.x; i < chunks; i += kSumThreads) Join::into(total, partial[i]);
  total = Join::over_block(total);
  if (threadIdx.x == 0) finish(total);
}

template <typename Term, typename Finish>
void sum_terms(const Term& term, int64_t count, int64_t chunk, double* scratch, const Finish& finish, Stream stream) {
  static_assert(sizeof(Sums<Term::kTerms>) == Term::kTerms * sizeof(double));
  auto* partial = reinterpret_cast<Sums<Term::kTerms>*>(scratch);
  const int64_t chunks = ceil_div(count, chunk);
  if (chunks > 0) {
    launch(sum_chunks_kernel<Term>, {dim3(static_cast<unsigned>(chunks)), dim3(kSumThreads)}, stream, term, count,
           chunk, partial);
  }
  launch(join_chunks_kernel<Term, Finish>, {dim3(1), dim3(kSumThreads)}, stream, partial, chunks, finish);
}

}  // namespace hybrid::cuda
