#include "common/parallel.h"
#include "rlhf/rlhf.h"

namespace hybrid {

// A task is one row: 16 bytes a token, a chain of two multiply-adds; nothing here is ever a bottleneck.
void gae(const GaeArgs& args) {
  parallel_for(args.batch, [&](int64_t row) {
    const float* rewards = args.rewards + row * args.steps;
    const float* values = args.values + row * args.steps;
    float* advantages = args.advantages + row * args.steps;
    float* returns = args.returns + row * args.steps;
    double next_value = 0.0, advantage = 0.0;
    for (int64_t t = args.steps - 1; t >= args.lengths[row]; --t) advantages[t] = returns[t] = 0.0f;
    for (int64_t t = args.lengths[row] - 1; t >= 0; --t) {
      const double delta = rewards[t] + args.gamma * next_value - values[t];
      advantage = delta + args.gamma * args.lam * advantage;
      next_value = values[t];
      advantages[t] = static_cast<float>(advantage);
      returns[t] = static_cast<float>(advantage + values[t]);
    }
  });
}

}  // namespace hybrid
