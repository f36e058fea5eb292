#include "attention/attention.h"

#include <vector>

#include "attention/plan.h"
#include "common/isa.h"

namespace hybrid {

HYBRID_DECLARE_SIMD(void attention_forward(const AttentionArgs& args, const AttentionPlan& plan))
HYBRID_DECLARE_SIMD(void attention_backward(const AttentionBackwardArgs& args))

void attention_forward(const AttentionArgs& args) {
  if (args.heads == 0 || args.head_dim == 0) return;
  const int64_t block = query_block_positions(args.heads / args.kv_heads);
  std::vector<int64_t> first_task{0};
  first_task.reserve(args.num_sequences + 1);
  for (int64_t i = 0; i < args.num_sequences; ++i) {
    const int64_t blocks = (args.sequences[i].q_rows + block - 1) / block;
    first_task.push_back(first_task.back() + blocks * args.kv_heads);
  }
  const AttentionPlan plan{first_task.data()};
  HYBRID_PICK_SIMD(attention_forward)(args, plan);
}

void attention_backward(const AttentionBackwardArgs& args) {
  if (args.heads == 0 || args.head_dim == 0) return;
  HYBRID_PICK_SIMD(attention_backward)(args);
}

}  // namespace hybrid
