#include "linear/linear.h"

#include <algorithm>

#include "common/isa.h"
#include "common/parallel.h"
#include "linear/scratch.h"

namespace hybrid {

HYBRID_DECLARE_SIMD(void linear(const LinearArgs& args))
HYBRID_DECLARE_SIMD(void matmul(const MatmulArgs& args))

#if defined(__x86_64__)
namespace amx {
void linear(const LinearArgs& args);
void matmul(const MatmulArgs& args);
void linear_tiles(const LinearTilesArgs& args, const ConsumeTile& consume);
}  // namespace amx
#define HYBRID_PICK_PRODUCT(name) (current_isa() == Isa::kAmx ? amx::name : HYBRID_PICK_SIMD(name))
#else
#define HYBRID_PICK_PRODUCT(name) HYBRID_PICK_SIMD(name)
#endif

void linear(const LinearArgs& args) { HYBRID_PICK_PRODUCT(linear)(args); }

void matmul(const MatmulArgs& args) { HYBRID_PICK_PRODUCT(matmul)(args); }

void linear_tiles(const LinearTilesArgs& args, const ConsumeTile& consume) {
  // Splitting rows for the matrix unit is worth doing once for all tiles; of a lone row there is hardly anything to split.
#if defined(__x86_64__)
  if (current_isa() == Isa::kAmx && args.M > 1) return amx::linear_tiles(args, consume);
#endif
  parallel_for((args.N + args.tile_cols - 1) / args.tile_cols, [&](int64_t tile) {
    float* const y = thread_scratch(ScratchSlot::kHead, args.M * args.tile_cols);
    const int64_t col = tile * args.tile_cols, cols = std::min(args.tile_cols, args.N - col);
    linear({.x = args.x, .ldx = args.ldx, .w = args.w.from(col * args.K), .ldw = args.K, .y = y, .ldy = args.tile_cols,
            .M = args.M, .N = cols, .K = args.K});
    consume(0, args.M, col, cols, y);
  });
}

void add_low_rank(const LowRankArgs& args) {
  const int64_t width = args.num_splits * args.R;
  linear({.x = args.x, .ldx = args.ldx, .w = args.a, .ldw = args.K, .y = args.scratch, .ldy = width,
          .M = args.M, .N = width, .K = args.K});
  int64_t col = 0;
  for (int64_t split = 0; split < args.num_splits; ++split) {
    float* y = args.y + col;
    linear({.x = args.scratch + split * args.R, .ldx = width, .w = args.b + col * args.R, .ldw = args.R,
            .residual = y, .ldr = args.ldy, .y = y, .ldy = args.ldy,
            .M = args.M, .N = args.splits[split], .K = args.R, .alpha = args.scale});
    col += args.splits[split];
  }
}

}  // namespace hybrid
