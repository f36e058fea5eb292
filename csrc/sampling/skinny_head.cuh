// A token a row from the language-model head, for at most 16 rows: decoding. No logits are written.
//
// skinny_head_kernel: a block owns 64 tokens, a block of the race. It multiplies them out 16 at a time, as skinny_linear.cuh does and
// with its bits; then 16 threads a row reduce the 64 logits in shared memory to what the row needs of them: the greatest, the sums of
// weights relative to it, and the token that wins the block's own race. draw_head_kernel: a block a row joins these.
//   bytes: V K sizeof(T) once; x, rows K sizeof(T), again for every 64 tokens, from L2; 20 a row and 64 tokens, written and read
//   flops: 2 V K a row, on 8 or 16 rows at a time; a Philox every two logits
//   bound: memory (W)
// Draws from the whole distribution, or the greatest logit: a truncated one needs all logits for its threshold.
#pragma once
#include "linear/skinny_linear.cuh"
#include "sampling/sampling.cuh"

namespace hybrid::cuda {

constexpr int kHeadLanes = kWarpSize * kSkinnyWarps / kSkinnyRows;  // that share a row
constexpr int kHeadOwn = kRaceBlock / kHeadLanes;                   // tokens of a lane
static_assert(kRaceBlock % kSkinnyOutputs == 0 && kHeadLanes <= kWarpSize);

template <typename T>
struct HeadShared {
  SkinnySums sums;
  float logits[kSkinnyRows][kRaceBlock + 1];
};

// Combines a value of the lanes that share a row; all of them get it.
template <typename T, typename Combine = Plus>
__device__ __forceinline__ T reduce_head_lanes(T value, Combine combine = {}) {
#pragma unroll
  for (int distance = kHeadLanes / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// The logits of the tokens from `first` on, rounded as the linear layer stores them.
template <typename T>
__device__ __forceinline__ void multiply_head(const HeadSampleParams<T>& p, int64_t first, bool aligned, HeadShared<T>& shared) {
  const MatrixRows<T> x{p.x, p.width, static_cast<int>(p.rows), aligned};
  const int thread = threadIdx.y * kWarpSize + threadIdx.x, row = thread / kSkinnyOutputs, own = thread % kSkinnyOutputs;
  for (int begin = 0; begin < kRaceBlock; begin += kSkinnyOutputs) {
    const int64_t token = first + begin;
    if (token >= p.vocab) break;
    const SkinnyWeight<T> weight(p.weight, p.width, token, token + kSkinnyOutputs / 2, p.vocab, p.vocab, aligned);
    shared.sums.multiply(weight, x, p.width);
    __syncthreads();
    shared.logits[row][begin + own] = rounded<T>(shared.sums.total(own, row));
    __syncthreads();
  }
}

template <typename T>
__global__ void __launch_bounds__(kWarpSize* kSkinnyWarps, kSkinnyBlocks) skinny_head_kernel(HeadSampleParams<T> p, bool aligned) {
  HeadShared<T>& shared = shared_memory<HeadShared<T>>();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRaceBlock;
  multiply_head(p, first, aligned, shared);

  const int thread = threadIdx.y * kWarpSize + threadIdx.x, row = thread / kHeadLanes, begin = thread % kHeadLanes * kHeadOwn;
  const int left = static_cast<int>(smaller(p.vocab - first, kRaceBlock)) - begin;
  float logits[kHeadOwn], top = -INFINITY;
#pragma unroll
  for (int i = 0; i < kHeadOwn; ++i) {
    logits[i] = i < left ? shared.logits[row][begin + i] : -INFINITY;
    top = fmaxf(top, logits[i]);
  }
  top = reduce_head_lanes(top, Larger());
  const bool greedy = p.temperature == 0.0f, any = row < p.rows;
  const LogitRow<T> block{nullptr, kRaceBlock, false, top, greedy ? 1.0f : p.temperature};
  RaceUniforms uniforms(p.seed, any ? static_cast<uint64_t>(p.sample_ids[row]) : 0, any ? static_cast<uint32_t>(p.positions[row]) : 0);
  float weight = 0.0f, weighted = 0.0f;
  int token = INT32_MAX;
  Race race;
#pragma unroll
  for (int i = 0; i < kHeadOwn; ++i) {
    if (logits[i] == -INFINITY) continue;  // relative to a maximum of -inf it would be NaN
    const float one = block.weight(logits[i]);
    weight += one;
    weighted = fmaf(one, block.exponent(logits[i]), weighted);
    const int at = static_cast<int>(first) + begin + i;
    if (greedy) {
      if (logits[i] == top && at < token) token = at;
    } else {
      race.enter(at, one, uniforms.of_token(at));
    }
  }
  weight = reduce_head_lanes(weight);
  weighted = reduce_head_lanes(weighted);
  if (!greedy) {
    const double time = race.winner() >= 0 ? race.time() : INFINITY, earliest = reduce_head_lanes(time, Smaller());
    if (race.winner() >= 0 && time == earliest) token = static_cast<int>(race.winner());
  }
  token = reduce_head_lanes(token, Smaller());
  if (any && begin == 0) {
    const float logit = token != INT32_MAX ? shared.logits[row][token - first] : NAN;
    p.blocks[row * gridDim.x + blockIdx.x] = {top, weight, weighted, logit, token};
  }
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads) draw_head_kernel(HeadSampleParams<T> p, int blocks) {
  RowReducers reduce;
  const int64_t index = blockIdx.x;
  const HeadBlock* of_row = p.blocks + index * blocks;
  const bool greedy = p.temperature == 0.0f;
  LogitRow<T> row{nullptr, static_cast<int>(p.vocab), false, -INFINITY, greedy ? 1.0f : p.temperature};
  for (int b = threadIdx.x; b < blocks; b += kRowThreads) row.max = fmaxf(row.max, of_row[b].max);
  row.max = reduce.floats(row.max, -INFINITY, Larger());

  RaceUniforms uniforms(p.seed, static_cast<uint64_t>(p.sample_ids[index]), static_cast<uint32_t>(p.positions[index]));
  double weight = 0.0, weighted = 0.0;
  int winner = INT32_MAX;  // block
  Race race;
  for (int b = threadIdx.x; b < blocks; b += kRowThreads) {
    const HeadBlock block = of_row[b];
    if (block.max == -INFINITY) {  // nothing, or NaN
      weight += block.weight;
      continue;
    }
    const double away = (static_cast<double>(block.max) - row.max) / row.temperature, scale = exp(away);
    weight += block.weight * scale;
    weighted += (block.weighted + block.weight * (away < -1000.0 ? -1000.0 : away)) * scale;  // 0 * infinity must not arise
    if (greedy) {
      if (block.max == row.max && b < winner) winner = b;
    } else {
      race.enter(b, block.weight * scale, uniforms.of_block(b));
    }
  }
  const RowTotals totals{reduce.doubles(weight), reduce.doubles(weighted)};
  winner = greedy ? reduce.integers(winner, INT32_MAX, Smaller()) : first_to_ring(race, reduce);
  if (threadIdx.x != 0) return;
  const bool drawn = is_distribution(totals);
  const RowScores<T> scores(row, totals);
  const float logprob = scores.logprob(drawn ? of_row[winner].logit : NAN);
  p.token[index] = drawn ? of_row[winner].token : -1;
  p.logprob[index] = p.kept_logprob[index] = logprob;
  p.entropy[index] = scores.entropy();
  p.kept_mass[index] = drawn ? 1.0f : NAN;
  p.threshold[index] = drawn ? -INFINITY : NAN;
}

template <typename T>
void sample_skinny_head(const HeadSampleParams<T>& p, Stream stream) {
  if (p.rows == 0) return;
  const auto blocks = static_cast<unsigned>(ceil_div(p.vocab, kRaceBlock));
  launch(skinny_head_kernel<T>, {dim3(blocks), dim3(kWarpSize, kSkinnyWarps)}, stream, p, packs_aligned(p.width, p.x, p.weight));
  launch(draw_head_kernel<T>, {dim3(static_cast<unsigned>(p.rows)), dim3(kRowThreads)}, stream, p, static_cast<int>(blocks));
}

}  // namespace hybrid::cuda
