// Scoring and sampling of rows of logits.
//
// A block owns a row and reads it in passes of 16 bytes a thread: the greatest logit; then the weights exp((x - m) / temperature),
// their sum and the entropy's, and with them the race of the blocks of 64; then the 64 tokens of the winner. Top-k and top-p add a
// search: a histogram over equal ranges of the logits' bit patterns, then over the range where the sum crosses, at most four times,
// each a pass. Counts and weights are added as integers (a weight in units of 2^-45), so that atomics give the same sums in any order.
//   bytes: V sizeof(T) from memory; a row of 128k fp32 logits stays in L2 for the later passes; flops: about 25 a logit and pass
//   bound: memory at many rows; at few, the latency of a block's 3 to 15 passes
// token_logprobs_backward: a thread owns 16 bytes; 1 read + 1 write of the logits; bound: memory.
#pragma once
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "sampling/race.h"
#include "sampling/sampling_cuda.h"

namespace hybrid::cuda {

constexpr int kRowThreads = 512;
constexpr int kRaceBlock = 64;  // tokens of a block in the race, as kRowBlock on the CPU

struct Larger {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
struct Smaller {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};

// A row and the block that reads it.
template <typename T>
struct LogitRow {
  const T* logits;
  int vocab;
  bool aligned;
  float max, temperature;
  float least = -INFINITY;  // logits below it weigh nothing

  // Calls fn(logits, first token, how many of them are inside the row) for this thread's packs. All threads of a block make the
  // same number of calls: fn may use shuffles.
  template <typename Fn>
  __device__ __forceinline__ void for_each_pack(const Fn& fn) const {
    for (int base = 0; base < vocab; base += kRowThreads * kPack<T>) {
      const int token = base + static_cast<int>(threadIdx.x) * kPack<T>;
      fn(load_pack(logits + token, vocab - token, aligned), token, vocab - token);
    }
  }

  // (x - m) / temperature, cut where every weight is 0; a NaN stays.
  __device__ __forceinline__ float exponent(float x) const {
    const float e = (x - max) / temperature;
    return e < -200.0f ? -200.0f : e;
  }
  __device__ __forceinline__ float weight(float x) const { return x < least ? 0.0f : expf(exponent(x)); }  // a NaN stays
};

// The block's reducers, one of each type: they share their buffers.
struct RowReducers {
  BlockReducer<float> floats;
  BlockReducer<double> doubles;
  BlockReducer<int> integers;
  BlockReducer<unsigned long long> units;
};

template <typename T>
__device__ __forceinline__ float greatest_logit(const LogitRow<T>& row, RowReducers& reduce) {
  float top = -INFINITY;
  row.for_each_pack([&](const Pack<T>& x, int, int left) {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) top = i < left ? fmaxf(top, x.value[i]) : top;
  });
  return reduce.floats(top, -INFINITY, Larger());
}

// Floats as unsigned integers in the order of their values; -0 and +0 share a key (threshold.h).
__device__ __forceinline__ unsigned ordered_key(float x) {
  const unsigned bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered_key(unsigned key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

struct RowTotals {
  double weight, weighted;  // sums of weights and of weight * exponent
};

template <typename T>
__device__ __forceinline__ RowTotals sum_weights(const LogitRow<T>& row, RowReducers& reduce) {
  double weight = 0.0, weighted = 0.0;
  row.for_each_pack([&](const Pack<T>& x, int, int left) {
    float w = 0.0f, we = 0.0f;
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      const float one = i < left ? row.weight(x.value[i]) : 0.0f;
      w += one;
      we = fmaf(one, row.exponent(x.value[i]), we);
    }
    weight += w;
    weighted += we;
  });
  return {reduce.doubles(weight), reduce.doubles(weighted)};
}

__device__ __forceinline__ bool is_distribution(const RowTotals& totals) {
  return totals.weight > 0.0 && totals.weight < INFINITY;
}

// What totals make of a row; NaN where it is no distribution.
template <typename T>
struct RowScores {
  const LogitRow<T>& row;
  double log_sum, mean_exponent;

  __device__ __forceinline__ RowScores(const LogitRow<T>& of, const RowTotals& totals)
      : row(of), log_sum(is_distribution(totals) ? log(totals.weight) : NAN), mean_exponent(totals.weighted / totals.weight) {}

  __device__ __forceinline__ double lse() const { return row.max / static_cast<double>(row.temperature) + log_sum; }
  __device__ __forceinline__ float entropy() const {
    const double value = log_sum - mean_exponent;
    return static_cast<float>(value < 0.0 ? 0.0 : value);
  }
  __device__ __forceinline__ float logprob(float logit) const {
    return static_cast<float>((static_cast<double>(logit) - row.max) / row.temperature - log_sum);
  }
};

template <typename T>
__global__ void __launch_bounds__(kRowThreads) token_logprobs_kernel(ScoreParams<T> p, bool aligned) {
  RowReducers reduce;
  const int64_t index = blockIdx.x;
  LogitRow<T> row{p.logits + index * p.vocab, static_cast<int>(p.vocab), aligned, 0.0f, p.temperature};
  const int64_t target = p.targets[index];
  const float logit = target >= 0 && target < p.vocab ? to_float(row.logits[target]) : NAN;
  const float threshold = p.thresholds != nullptr ? p.thresholds[index] : -INFINITY;
  row.least = logit < threshold ? logit : threshold;
  row.max = greatest_logit(row, reduce);
  const RowTotals totals = sum_weights(row, reduce);
  if (threadIdx.x != 0) return;
  const RowScores<T> scores(row, totals);
  p.logprob[index] = scores.logprob(logit);
  p.entropy[index] = scores.entropy();
  p.lse[index] = scores.lse();
  p.threshold[index] = row.least;
}

// With z = logits / temperature: d logprob / dz_j = [j = target] - p_j, d entropy / dz_j = -p_j (log p_j + entropy). log p_j is
// formed from the exact logit in double, then rounded: z and lse may be large and close.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) token_logprobs_backward_kernel(ScoreBackwardParams<T> p, bool aligned) {
  const int64_t per_row = ceil_div(p.vocab, kPack<T>);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  const int64_t row = index / per_row, token = index % per_row * kPack<T>, left = p.vocab - token;
  if (row >= p.rows) return;
  const float inverse = 1.0f / p.temperature, grad_logprob = p.grad_logprob[row], grad_entropy = p.grad_entropy[row];
  const float entropy = p.entropy[row], threshold = p.thresholds[row];
  const double lse = p.lse[row], slope = 1.0 / static_cast<double>(p.temperature);
  const int64_t target = p.targets[row] - token;
  const Pack<T> x = load_pack(p.logits + row * p.vocab + token, left, aligned);
  Pack<T> grad;
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    const float log_p = static_cast<float>(fma(static_cast<double>(x.value[i]), slope, -lse));
    const float bounded = log_p < -200.0f ? -200.0f : log_p;  // 0 * infinity must not arise
    const float weight = x.value[i] < threshold ? 0.0f : expf(bounded);
    const float share = weight * fmaf(grad_entropy, bounded + entropy, grad_logprob);
    grad.value[i] = ((i == target ? grad_logprob : 0.0f) - share) * inverse;
  }
  store_pack(p.grad + row * p.vocab + token, grad, left, aligned);
}

// ---- top-k and top-p ---------------------------------------------------------------------------------------------------------

using Units = unsigned long long;  // of weight: 2^-45, so that 2^17 and more weights of at most 1 fit

__device__ __forceinline__ Units weight_units(float weight) { return static_cast<Units>(weight * 0x1p45f); }

constexpr int kBinBits = 10, kBins = 1 << kBinBits;

struct Histogram {
  Units bins[kBins];
  Units above;  // measure of the keys over the bin where the sum crosses
  int crossing;
};

// The greatest key at or above which the row's measures add up to `wanted`, which is at least 1 and at most their sum over the keys
// from `low` up. No logit has a key beyond `high`.
template <typename T, typename Measure>
__device__ __forceinline__ unsigned find_threshold(const LogitRow<T>& row, unsigned low, unsigned high, Units wanted, const Measure& measure) {
  Histogram& histogram = shared_memory<Histogram>();
  Units above = 0;
  for (;;) {
    const unsigned width = high - low;
    int shift = 0;
    while (width >> shift >= kBins) ++shift;
    for (int i = threadIdx.x; i < kBins; i += kRowThreads) histogram.bins[i] = 0;
    __syncthreads();
    row.for_each_pack([&](const Pack<T>& x, int, int left) {
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        const unsigned key = ordered_key(x.value[i]);
        if (i < left && key >= low && key <= high) {
          atomicAdd(&histogram.bins[(key - low) >> shift], measure(expf(row.exponent(x.value[i]))));
        }
      }
    });
    __syncthreads();
    if (threadIdx.x < kWarpSize) {  // a lane owns 32 bins, lane 0 the highest
      constexpr int kOwn = kBins / kWarpSize;
      const int lane = threadIdx.x, top_bin = kBins - 1 - lane * kOwn;
      Units own = 0;
      for (int i = 0; i < kOwn; ++i) own += histogram.bins[top_bin - i];
      Units sum = own;  // of this lane's bins and all higher ones
#pragma unroll
      for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const Units higher = __shfl_up_sync(kAllLanes, sum, distance);
        if (lane >= distance) sum += higher;
      }
      const unsigned crossed = __ballot_sync(kAllLanes, above + sum >= wanted);
      if (crossed != 0 && lane == __ffs(crossed) - 1) {
        Units reached = above + sum - own;
        int bin = top_bin;
        while (reached + histogram.bins[bin] < wanted) reached += histogram.bins[bin--];
        histogram.crossing = bin;
        histogram.above = reached;
      }
    }
    __syncthreads();
    above = histogram.above;
    low += static_cast<unsigned>(histogram.crossing) << shift;
    if (shift == 0) return low;
    high = static_cast<unsigned>(smaller(high, static_cast<int64_t>(low) + (int64_t{1} << shift) - 1));
  }
}

// Weight of the tokens whose key is at least `key`, as the histogram adds it up.
template <typename T>
__device__ __forceinline__ Units weight_from(const LogitRow<T>& row, unsigned key, RowReducers& reduce) {
  Units sum = 0;
  row.for_each_pack([&](const Pack<T>& x, int, int left) {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      if (i < left && ordered_key(x.value[i]) >= key) sum += weight_units(expf(row.exponent(x.value[i])));
    }
  });
  return reduce.units(sum);
}

// Top-k, then top-p of what top-k left: the least logit kept.
template <typename T>
__device__ __forceinline__ float truncate(const LogitRow<T>& row, const SamplingRule& rule, RowReducers& reduce) {
  const unsigned highest = ordered_key(row.max);
  unsigned key = 0;
  if (rule.top_k > 0 && rule.top_k < row.vocab) {
    key = find_threshold(row, 0u, highest, static_cast<Units>(rule.top_k), [](float) { return Units{1}; });
  }
  if (rule.top_p < 1.0f) {
    const double wanted = ceil(static_cast<double>(rule.top_p) * static_cast<double>(weight_from(row, key, reduce)));
    key = find_threshold(row, key, highest, static_cast<Units>(wanted), [](float weight) { return weight_units(weight); });
  }
  return from_ordered_key(key);
}

// ---- the draw ----------------------------------------------------------------------------------------------------------------

// The runner of the whole block whose clock rings first; of clocks that ring together the lowest number.
__device__ __forceinline__ int first_to_ring(const Race& mine, RowReducers& reduce) {
  const double time = mine.winner() >= 0 ? mine.time() : INFINITY;
  const double first = reduce.doubles(time, INFINITY, Smaller());
  const int runner = mine.winner() >= 0 && time == first ? static_cast<int>(mine.winner()) : INT32_MAX;
  return reduce.integers(runner, INT32_MAX, Smaller());
}

// A race of the blocks of 64, then of the winner's tokens.
template <typename T>
__device__ __forceinline__ int draw(const LogitRow<T>& row, RaceUniforms uniforms, RowReducers& reduce) {
  constexpr int kLanes = kRaceBlock / kPack<T>;  // lanes that share a block
  Race blocks;
  row.for_each_pack([&](const Pack<T>& x, int token, int left) {
    float weight = 0.0f;
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      if (i < left) weight += row.weight(x.value[i]);
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      weight += __shfl_xor_sync(kAllLanes, weight, distance);
    }
    if (threadIdx.x % kLanes == 0 && left > 0) {
      blocks.enter(token / kRaceBlock, weight, uniforms.of_block(token / kRaceBlock));
    }
  });
  const int token = first_to_ring(blocks, reduce) * kRaceBlock + static_cast<int>(threadIdx.x);
  Race tokens;
  if (threadIdx.x < kRaceBlock && token < row.vocab) {
    tokens.enter(token, row.weight(to_float(row.logits[token])), uniforms.of_token(token));
  }
  return first_to_ring(tokens, reduce);
}

template <typename T>
__device__ __forceinline__ int first_greatest(const LogitRow<T>& row, RowReducers& reduce) {
  int first = INT32_MAX;
  row.for_each_pack([&](const Pack<T>& x, int token, int left) {
#pragma unroll
    for (int i = kPack<T> - 1; i >= 0; --i) {
      if (i < left && x.value[i] == row.max && token + i < first) first = token + i;
    }
  });
  return reduce.integers(first, INT32_MAX, Smaller());
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads, 1) sample_kernel(SampleParams<T> p, bool aligned) {
  RowReducers reduce;
  const int64_t index = blockIdx.x;
  const bool greedy = p.rule.temperature == 0.0f;
  LogitRow<T> row{p.logits + index * p.vocab, static_cast<int>(p.vocab), aligned, 0.0f, greedy ? 1.0f : p.rule.temperature};
  row.max = greatest_logit(row, reduce);
  const RowTotals totals = sum_weights(row, reduce);
  RowTotals kept = totals;
  int token = -1;
  if (is_distribution(totals) && greedy) {
    token = first_greatest(row, reduce);
  } else if (is_distribution(totals)) {
    if ((p.rule.top_k > 0 && p.rule.top_k < p.vocab) || p.rule.top_p < 1.0f) {
      row.least = truncate(row, p.rule, reduce);
      kept = sum_weights(row, reduce);
    }
    const RaceUniforms uniforms(p.rule.seed, static_cast<uint64_t>(p.sample_ids[index]),
                                static_cast<uint32_t>(p.positions[index]));
    token = draw(row, uniforms, reduce);
  }
  if (threadIdx.x != 0) return;
  const float logit = token >= 0 ? to_float(row.logits[token]) : NAN;
  const RowScores<T> scores(row, totals), kept_scores(row, kept);
  const double mass = kept.weight / totals.weight;
  p.token[index] = token;
  p.logprob[index] = scores.logprob(logit);
  p.entropy[index] = scores.entropy();
  p.kept_mass[index] = token < 0 ? NAN : mass < 1.0 ? static_cast<float>(mass) : 1.0f;
  p.threshold[index] = token < 0 ? NAN : row.least;
  p.kept_logprob[index] = kept_scores.logprob(logit);
}

template <typename T>
void token_logprobs(const ScoreParams<T>& p, Stream stream) {
  if (p.rows == 0) return;
  launch(token_logprobs_kernel<T>, {dim3(static_cast<unsigned>(p.rows)), dim3(kRowThreads)}, stream, p,
         packs_aligned(p.vocab, p.logits));
}

template <typename T>
void token_logprobs_backward(const ScoreBackwardParams<T>& p, Stream stream) {
  const int64_t threads = p.rows * ceil_div(p.vocab, kPack<T>);
  if (threads == 0) return;
  launch(token_logprobs_backward_kernel<T>, {dim3(static_cast<unsigned>(ceil_div(threads, kRowThreads))), dim3(kRowThreads)},
         stream, p, packs_aligned(p.vocab, p.logits, p.grad));
}

template <typename T>
void sample(const SampleParams<T>& p, Stream stream) {
  if (p.rows == 0) return;
  launch(sample_kernel<T>, {dim3(static_cast<unsigned>(p.rows)), dim3(kRowThreads)}, stream, p,
         packs_aligned(p.vocab, p.logits));
}

}  // namespace hybrid::cuda
