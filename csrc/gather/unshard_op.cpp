#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "common/dims.h"
#include "gather/unshard.h"
#include "gather/unshard_checks.h"

namespace hybrid {
namespace {

using at::Tensor;

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
  check_unshard_lists(args, parts, sizes, offsets, dims["E"]);
  unshard(args);
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CPU, m) { m.impl("unshard_", unshard_cpu); }

}  // namespace hybrid
