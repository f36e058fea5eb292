// The language-model head on a GPU. Up to 16 rows draw without their logits (skinny_head.cuh), unless top-k or top-p needs them. Else
// some rows at a time, so that no more of their logits exist at once, in the weights' dtype: 256 rows are enough for the reading of the
// head to be bound by arithmetic.
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/cuda_op.h"
#include "common/dims.h"
#include "linear/linear_cuda.h"
#include "linear/linear_cuda_op.h"
#include "sampling/draw.h"
#include "sampling/row.h"
#include "sampling/sampling_cuda.h"
#include "sampling/sampling_cuda_op.h"

namespace hybrid {
namespace {

using at::Tensor;

constexpr int64_t kSampledRows = 256;

// Columns of results, row chunk after row chunk, as one tuple of tensors.
template <typename Results, size_t... kIndex>
Results join(const std::vector<Results>& chunks, std::index_sequence<kIndex...>) {
  const auto column = [&]<size_t kColumn>() {
    std::vector<Tensor> parts;
    for (const Results& chunk : chunks) parts.push_back(std::get<kColumn>(chunk));
    return at::cat(parts);
  };
  return {column.template operator()<kIndex>()...};
}

// fn(first row, rows, their logits) of every chunk, joined. No rows make one empty chunk.
template <typename Fn>
auto for_each_chunk(const Tensor& hidden, const Tensor& weight, int64_t chunk_rows, const Fn& fn) {
  using Results = decltype(fn(int64_t{}, int64_t{}, hidden));
  const int64_t rows = hidden.size(0);
  std::vector<Results> chunks;
  for (int64_t first = 0; first < std::max<int64_t>(rows, 1); first += chunk_rows) {
    const int64_t count = std::min(chunk_rows, rows - first);
    const Tensor logits = linear_cuda(hidden.narrow(0, first, count), weight, {}, {}, {}, 1.0, {});
    chunks.push_back(fn(first, count, logits));
  }
  if (chunks.size() == 1) return chunks[0];
  return join(chunks, std::make_index_sequence<std::tuple_size_v<Results>>());
}

// Chunks as the backward takes them: cuBLAS gives the same logits for the same shapes.
ScoreTensors linear_token_logprobs_cuda(const Tensor& hidden, const Tensor& weight, const Tensor& targets, double temperature,
                                        const std::optional<Tensor>& thresholds, int64_t chunk_rows) {
  constexpr const char* kOp = "linear_token_logprobs";
  Dims dims(kOp, at::kCUDA);
  dims.expect(hidden, "hidden", {"N", "K"}, hidden.scalar_type())
      .expect(weight, "weight", {"V", "K"}, hidden.scalar_type())
      .expect(targets, "targets", {"N"}, at::kLong)
      .expect(thresholds, "thresholds", {"N"});
  check_vocab(kOp, dims["V"]);
  check_temperature(kOp, temperature);
  TORCH_CHECK_VALUE(chunk_rows >= 1, kOp, ": chunk_rows is ", chunk_rows, "; expected at least 1");
  const OnDevice here(hidden);
  return for_each_chunk(hidden, weight, chunk_rows, [&](int64_t first, int64_t count, const Tensor& logits) {
    const auto part = [&](const Tensor& whole) { return whole.narrow(0, first, count); };
    return token_logprobs_cuda(logits, part(targets), temperature,
                               thresholds ? std::optional<Tensor>(part(*thresholds)) : std::nullopt);
  });
}

SampleTensors sample_skinny_head(const Tensor& hidden_, const Tensor& weight_, const SamplingRule& rule, const Tensor& sample_ids_,
                                 const Tensor& positions_, const OnDevice& here) {
  const Tensor hidden = hidden_.contiguous(), weight = weight_.contiguous();
  const Tensor sample_ids = sample_ids_.contiguous(), positions = positions_.contiguous();
  const int64_t rows = hidden.size(0), vocab = weight.size(0);
  const auto floats = [&] { return at::empty({rows}, hidden.options().dtype(at::kFloat)); };
  const SampleTensors drawn{at::empty({rows}, sample_ids.options()), floats(), floats(), floats(), floats(), floats()};
  const auto& [token, logprob, entropy, kept_mass, threshold, kept_logprob] = drawn;
  const auto scratch = static_cast<int64_t>(sizeof(cuda::HeadBlock)) * rows * row_blocks(vocab);
  const Tensor blocks = at::empty({scratch}, hidden.options().dtype(at::kByte));
  dispatch_float("linear_sample", hidden, [&](auto kind) {
    using T = decltype(kind);
    cuda::sample_skinny_head<T>({.x = input<T>(hidden),
                                 .weight = input<T>(weight),
                                 .temperature = rule.temperature,
                                 .seed = rule.seed,
                                 .sample_ids = input<int64_t>(sample_ids),
                                 .positions = input<int64_t>(positions),
                                 .blocks = output<cuda::HeadBlock>(blocks),
                                 .token = output<int64_t>(token),
                                 .logprob = output<float>(logprob),
                                 .entropy = output<float>(entropy),
                                 .kept_mass = output<float>(kept_mass),
                                 .threshold = output<float>(threshold),
                                 .kept_logprob = output<float>(kept_logprob),
                                 .rows = rows,
                                 .vocab = vocab,
                                 .width = hidden.size(1)},
                                here.stream);
  });
  return drawn;
}

SampleTensors linear_sample_cuda(const Tensor& hidden, const Tensor& weight, double temperature, int64_t top_k, double top_p,
                                 int64_t seed, const Tensor& sample_ids, const Tensor& positions) {
  constexpr const char* kOp = "linear_sample";
  Dims dims(kOp, at::kCUDA);
  dims.expect(hidden, "hidden", {"N", "K"}, hidden.scalar_type())
      .expect(weight, "weight", {"V", "K"}, hidden.scalar_type())
      .expect(sample_ids, "sample_ids", {"N"}, at::kLong)
      .expect(positions, "positions", {"N"}, at::kLong);
  check_vocab(kOp, dims["V"]);
  const SamplingRule rule = check_rule(kOp, temperature, top_k, top_p, seed);
  const OnDevice here(hidden);
  if (dims["N"] <= cuda::kSkinnyRows && !truncates(rule, dims["V"])) {
    return sample_skinny_head(hidden, weight, rule, sample_ids, positions, here);
  }
  return for_each_chunk(hidden, weight, kSampledRows, [&](int64_t first, int64_t count, const Tensor& logits) {
    return sample_cuda(logits, temperature, top_k, top_p, seed, sample_ids.narrow(0, first, count),
                       positions.narrow(0, first, count));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CUDA, m) {
  m.impl("linear_token_logprobs", linear_token_logprobs_cuda);
  m.impl("linear_sample", linear_sample_cuda);
}

}  // namespace hybrid
