#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <numeric>

#include "common/dims.h"
#include "gather/unshard.h"

namespace hybrid {
namespace {

using at::Tensor;

void check_lists(const UnshardArgs& args, at::IntArrayRef parts, at::IntArrayRef sizes, at::IntArrayRef offsets,
                 int64_t capacity) {
  TORCH_CHECK_VALUE(parts.size() == sizes.size() && parts.size() == offsets.size(), "unshard_: parts, sizes and offsets have ",
                    parts.size(), ", ", sizes.size(), " and ", offsets.size(), " entries; expected one a parameter");
  int64_t held = 0, end = 0;
  for (size_t p = 0; p < parts.size(); ++p) {
    TORCH_CHECK_VALUE(parts[p] >= 0 && sizes[p] >= 0 && sizes[p] <= args.ranks * parts[p], "unshard_: sizes[", p, "] is ",
                      sizes[p], "; expected 0 to ", args.ranks, " (ranks) times parts[", p, "]=", parts[p]);
    TORCH_CHECK_VALUE(offsets[p] >= end, "unshard_: offsets[", p, "] is ", offsets[p],
                      "; expected at least ", end, ", the end of the parameter before it");
    held += parts[p];
    end = offsets[p] + sizes[p];
  }
  TORCH_CHECK_VALUE(held == args.shard, "unshard_: parts sum to ", held, "; expected the ", args.shard,
                    " columns of shards");
  TORCH_CHECK_VALUE(end <= capacity, "unshard_: the last parameter ends at ", end, "; expected at most ", capacity,
                    ", the size of out");
}

void unshard_cpu(Tensor& out, const Tensor& shards_, at::IntArrayRef parts, at::IntArrayRef sizes,
                 at::IntArrayRef offsets) {
  Dims dims("unshard_");
  dims.expect(out, "out", {"E"}, at::kByte).expect(shards_, "shards", {"W", "S"}, at::kByte);
  TORCH_CHECK_VALUE(out.is_contiguous(), "unshard_: out has strides ", out.strides(),
                    "; expected contiguous bytes, since it is written in place");
  const Tensor shards = shards_.contiguous();
  const UnshardArgs args{.shards = static_cast<const std::byte*>(shards.const_data_ptr()),
                         .ranks = dims["W"],
                         .shard = dims["S"],
                         .parts = parts.data(),
                         .sizes = sizes.data(),
                         .offsets = offsets.data(),
                         .parameters = static_cast<int64_t>(parts.size()),
                         .out = static_cast<std::byte*>(out.mutable_data_ptr())};
  check_lists(args, parts, sizes, offsets, dims["E"]);
  unshard(args);
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CPU, m) { m.impl("unshard_", unshard_cpu); }

}  // namespace hybrid
