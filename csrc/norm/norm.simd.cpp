// RMSNorm and LayerNorm, forward and backward.
// A task owns a run of whole rows; a row stays in the first-level cache over its passes. Forward: reads 4 bytes and writes 4 an
// element (8 and 8 with a residual); backward: reads 8, writes 4. Bound by memory once the rows leave the cache.
#include <cmath>

#include "common/parallel.h"
#include "common/vec.h"
#include "norm/norm.h"

namespace hybrid::HYBRID_ISA {
namespace {

constexpr int64_t kElementsPerTask = 16384;  // some microseconds
constexpr int64_t kColumnsPerTask = 512;

// Runs fn(row) over the rows, several to a task.
template <typename Fn>
void for_each_row(int64_t rows, int64_t cols, const Fn& fn) {
  const int64_t per_task = cols >= kElementsPerTask ? 1 : kElementsPerTask / (cols + 1) + 1;
  parallel_for((rows + per_task - 1) / per_task, [&](int64_t task) {
    const int64_t end = (task + 1) * per_task < rows ? (task + 1) * per_task : rows;
    for (int64_t row = task * per_task; row < end; ++row) fn(row);
  });
}

// Sum of term(i, lanes) over [begin, end) in four interleaved chains, which hide the latency of the adds.
template <typename Term>
Vec sum_block(int64_t begin, int64_t end, const Term& term) {
  constexpr int64_t step = 4 * Vec::width;
  Vec total[4];
  int64_t i = begin;
  for (; i + step <= end; i += step) {
#pragma GCC unroll 4
    for (int chain = 0; chain < 4; ++chain) total[chain] += term(i + chain * Vec::width, Vec::width);
  }
#pragma GCC unroll 4  // the chains stay in registers
  for (int chain = 0; chain < 4; ++chain, i += Vec::width) {
    if (i < end) total[chain] += term(i, end - i < Vec::width ? end - i : Vec::width);
  }
  return (total[0] + total[1]) + (total[2] + total[3]);
}

// Sum of term over a row, which gives 0 in idle lanes. Blocks keep the running sums short, hence accurate, in long rows.
template <typename Term>
float sum_row(int64_t cols, const Term& term) {
  constexpr int64_t kBlock = 2048;
  Vec total;
  for (int64_t begin = 0; begin < cols; begin += kBlock) {
    total += sum_block(begin, cols - begin < kBlock ? cols : begin + kBlock, term);
  }
  return reduce_add(total);
}

// What is normalised, on its first reading: x, or x + residual, which is left in sum for the later passes.
struct Row {
  const float* x;
  const float* residual;
  float* sum;
  const float* later;

  Row(const NormArgs& args, int64_t row)
      : x(args.x + row * args.cols),
        residual(args.residual == nullptr ? nullptr : args.residual + row * args.cols),
        sum(args.residual == nullptr ? nullptr : args.sum + row * args.cols),
        later(residual == nullptr ? x : sum) {}

  Vec first(int64_t i, int64_t lanes) const {
    const Vec value = Vec::load(x + i, lanes);
    if (residual == nullptr) return value;
    const Vec added = value + Vec::load(residual + i, lanes);
    added.store(sum + i, lanes);
    return added;
  }
};

Vec zero_beyond(Vec value, int64_t lanes) {
  if (lanes == Vec::width) return value;
  float kept[kVecWidth];
  value.store(kept);
  return Vec::load(kept, lanes);
}

void rms_norm_row(const NormArgs& args, int64_t row) {
  const Row in(args, row);
  const float* x = in.later;
  float* y = args.y + row * args.cols;
  const float square = sum_row(args.cols, [&](int64_t i, int64_t lanes) {
    const Vec value = in.first(i, lanes);
    return value * value;
  });
  const float rstd = 1.0f / sqrtf(square / static_cast<float>(args.cols) + args.eps);
  for_each_vec(args.cols, [&](int64_t i, int64_t lanes) {
    const Vec scaled = (Vec::load(x + i, lanes) * rstd) * Vec::load(args.weight + i, lanes);
    (args.bias ? scaled + Vec::load(args.bias + i, lanes) : scaled).store(y + i, lanes);
  });
  if (args.rstd) args.rstd[row] = rstd;
}

void layer_norm_row(const NormArgs& args, int64_t row) {
  const Row in(args, row);
  const float* x = in.later;
  float* y = args.y + row * args.cols;
  const float count = static_cast<float>(args.cols);
  const float mean = sum_row(args.cols, [&](int64_t i, int64_t lanes) { return in.first(i, lanes); }) / count;
  // The deviations are squared after the mean is known: E[x^2] - E[x]^2 would cancel for rows with a large mean.
  const float square = sum_row(args.cols, [&](int64_t i, int64_t lanes) {
    const Vec deviation = zero_beyond(Vec::load(x + i, lanes) - mean, lanes);
    return deviation * deviation;
  });
  const float rstd = 1.0f / sqrtf(square / count + args.eps);
  for_each_vec(args.cols, [&](int64_t i, int64_t lanes) {
    const Vec scaled = ((Vec::load(x + i, lanes) - mean) * rstd) * Vec::load(args.weight + i, lanes);
    (args.bias ? scaled + Vec::load(args.bias + i, lanes) : scaled).store(y + i, lanes);
  });
  if (args.mean) args.mean[row] = mean;
  if (args.rstd) args.rstd[row] = rstd;
}

// With n = (x - mean) rstd and g = grad_y weight:  grad_x = rstd (g - mean(g) - n mean(g n)); RMSNorm has neither mean nor
// mean(g). Adds grad_y n and grad_y to the block's partial sums.
template <bool kCentered>
void backward_row(const NormBackwardArgs& args, int64_t row, float* weight_sum, float* bias_sum) {
  const float* grad_y = args.grad_y + row * args.cols;
  const float* x = args.x + row * args.cols;
  float* grad_x = args.grad_x + row * args.cols;
  const float count = static_cast<float>(args.cols);
  const float rstd = args.rstd[row];
  const float mean = kCentered ? args.mean[row] : 0.0f;
  const auto normalised = [&](int64_t i, int64_t lanes) { return (Vec::load(x + i, lanes) - mean) * rstd; };
  const auto weighted = [&](int64_t i, int64_t lanes) {
    return Vec::load(grad_y + i, lanes) * Vec::load(args.weight + i, lanes);
  };
  const float slope =
      sum_row(args.cols, [&](int64_t i, int64_t lanes) { return weighted(i, lanes) * normalised(i, lanes); }) / count;
  const float shift = kCentered ? sum_row(args.cols, weighted) / count : 0.0f;
  for_each_vec(args.cols, [&](int64_t i, int64_t lanes) {
    const Vec grad = Vec::load(grad_y + i, lanes);
    const Vec n = normalised(i, lanes);
    ((fma(-n, slope, weighted(i, lanes)) - shift) * rstd).store(grad_x + i, lanes);
    fma(grad, n, Vec::load(weight_sum + i, lanes)).store(weight_sum + i, lanes);
    if (kCentered) (Vec::load(bias_sum + i, lanes) + grad).store(bias_sum + i, lanes);
  });
}

// out[c] = sum over blocks of partial[block, c], the blocks stride floats apart.
void sum_blocks(const float* partial, int64_t blocks, int64_t stride, int64_t cols, float* out) {
  parallel_for((cols + kColumnsPerTask - 1) / kColumnsPerTask, [&](int64_t task) {
    const int64_t begin = task * kColumnsPerTask;
    const int64_t size = cols - begin < kColumnsPerTask ? cols - begin : kColumnsPerTask;
    for_each_vec(size, [&](int64_t i, int64_t lanes) {
      Vec total;
      for (int64_t block = 0; block < blocks; ++block) total += Vec::load(partial + block * stride + begin + i, lanes);
      total.store(out + begin + i, lanes);
    });
  });
}

template <bool kCentered>
void norm_backward(const NormBackwardArgs& args) {
  const int64_t blocks = norm_backward_blocks(args.rows);
  const int64_t stride = (kCentered ? 2 : 1) * args.cols;
  parallel_for(blocks, [&](int64_t block) {
    float* weight_sum = args.partial + block * stride;
    float* bias_sum = weight_sum + args.cols;
    for (int64_t i = 0; i < stride; ++i) weight_sum[i] = 0.0f;
    const int64_t begin = block * kNormBackwardRows;
    const int64_t end = begin + kNormBackwardRows < args.rows ? begin + kNormBackwardRows : args.rows;
    for (int64_t row = begin; row < end; ++row) backward_row<kCentered>(args, row, weight_sum, bias_sum);
  });
  sum_blocks(args.partial, blocks, stride, args.cols, args.grad_weight);
  if (kCentered) sum_blocks(args.partial + args.cols, blocks, stride, args.cols, args.grad_bias);
}

}  // namespace

void rms_norm(const NormArgs& args) {
  for_each_row(args.rows, args.cols, [&](int64_t row) { rms_norm_row(args, row); });
}
void layer_norm(const NormArgs& args) {
  for_each_row(args.rows, args.cols, [&](int64_t row) { layer_norm_row(args, row); });
}
void rms_norm_backward(const NormBackwardArgs& args) { norm_backward<false>(args); }
void layer_norm_backward(const NormBackwardArgs& args) { norm_backward<true>(args); }

}  // namespace hybrid::HYBRID_ISA
