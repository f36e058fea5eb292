#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "common/dims.h"
#include "gather/unshard.h"
#include "gather/unshard_checks.h"

namespace hybrid {
namespace {

using at::Tensor;

void unshard_cpu(Tensor& out, const Tensor& shards_, at::IntArrayRef columns, at::IntArrayRef parts,
                 at::IntArrayRef starts, at::IntArrayRef sizes, at::IntArrayRef offsets) {
  Dims dims("unshard_");
  dims.expect(out, "out", {"E"}, at::kByte).expect(shards_, "shards", {"W", "S"}, at::kByte);
  TORCH_CHECK_VALUE(out.is_contiguous(), "unshard_: out has strides ", out.strides(),
                    "; expected contiguous bytes, since it is written in place");
  for (const at::IntArrayRef list : {parts, starts, sizes, offsets}) {
    TORCH_CHECK_VALUE(list.size() == columns.size(), "unshard_: a list has ", list.size(), " entries where columns has ",
                      columns.size(), "; expected one a run");
  }
  // Rows may be apart: in memory that ranks share, each has more than this part.
  const bool rows_are_whole = dims["S"] <= 1 || shards_.stride(1) == 1;
  const Tensor shards = rows_are_whole ? shards_ : shards_.contiguous();
  const UnshardArgs args{.shards = static_cast<const std::byte*>(shards.const_data_ptr()),
                         .ranks = dims["W"],
                         .shard = shards.stride(0),
                         .columns = columns.data(),
                         .parts = parts.data(),
                         .starts = starts.data(),
                         .sizes = sizes.data(),
                         .offsets = offsets.data(),
                         .runs = static_cast<int64_t>(columns.size()),
                         .out = static_cast<std::byte*>(out.mutable_data_ptr())};
  check_unshard_runs(args, columns, parts, starts, sizes, offsets, dims["S"], dims["E"]);
  unshard(args);
}

}  // namespace

TORCH_LIBRARY_IMPL(hybrid_kernels, CPU, m) { m.impl("unshard_", unshard_cpu); }

}  // namespace hybrid
