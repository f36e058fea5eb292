#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "common/cuda_op.h"
#include "common/dims.h"
#include "gather/unshard_checks.h"
#include "gather/unshard_cuda.h"

namespace hybrid {
namespace {

using at::Tensor;

void unshard_cuda(Tensor& out, const Tensor& shards_, at::IntArrayRef columns, at::IntArrayRef parts,
                  at::IntArrayRef starts, at::IntArrayRef sizes, at::IntArrayRef offsets) {
  Dims dims("unshard_", at::kCUDA);
  dims.expect(out, "out", {"E"}, at::kByte).expect(shards_, "shards", {"W", "S"}, at::kByte);
  TORCH_CHECK_VALUE(out.is_contiguous(), "unshard_: out has strides ", out.strides(),
                    "; expected contiguous bytes, since it is written in place");
  const OnDevice here(out);
  const Tensor shards = shards_.contiguous();
  const UnshardArgs args{.shards = input<std::byte>(shards),
                         .ranks = dims["W"],
                         .shard = dims["S"],
                         .columns = columns.data(),
                         .parts = parts.data(),
                         .starts = starts.data(),
                         .sizes = sizes.data(),
                         .offsets = offsets.data(),
                         .runs = static_cast<int64_t>(columns.size()),
                         .out = output<std::byte>(out)};
  check_unshard_runs(args, columns, parts, starts, sizes, offsets, dims["S"], dims["E"]);
  cuda::unshard(args, here.stream);
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CUDA, m) { m.impl("unshard_", unshard_cuda); }

}  // namespace hybrid
