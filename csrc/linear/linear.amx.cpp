// linear and matmul on the matrix unit of processors that have one (AMX); matrix_unit.h says how it multiplies floats.
//
// The right factor, activations in linear, is split into a panel once a call, some columns at a time; it stays in L2. A thread
// walks through groups of kGroupRows rows of the left one, weights in linear. A step of them is split, into L1, while the unit
// multiplies the step before, and the next group is fetched meanwhile: with few columns the weights pass by as fast as memory
// gives them.
//
// Every output is one sum in one order, whatever the numbers of rows, columns and threads: over depth by steps of 32, in chains of
// kChainSteps whose totals are added in order. Sums that leave the unit within a chain come back as they were.
// Bound by reading the weights up to some 32 rows of x, by the unit beyond.
#include "common/parallel.h"
#include "linear/finish.h"
#include "linear/linear.h"
#include "linear/matrix_block.h"
#include "linear/scratch.h"

namespace hybrid::HYBRID_ISA {
namespace {

constexpr int64_t kChainSteps = 18;           // 576 deep
constexpr int64_t kBlockSteps = 4;            // that stay split, in 24 KiB of L1, while all pairs of column tiles pass
constexpr int64_t kPanelFloats = 256 * 1024;  // 1 MiB: half of an L2
constexpr int64_t kMostTiles = 16;            // of a panel; a group's sums with them are 32 KiB
constexpr int64_t kTaskWork = 1 << 20;        // multiply-adds that are worth handing to a thread

int64_t steps_of(int64_t depth) { return larger(1, ceil_div(depth, kStep)); }

// Columns [col, col + cols) of the right factor in tiles.
struct Panel {
  float* words;
  int64_t col, cols, steps;

  int64_t tiles() const { return ceil_div(cols, kTile); }
  int64_t pairs() const { return ceil_div(tiles(), 2); }
  float* at(int64_t tile, int64_t step) const { return words + (tile * steps + step) * kPanelStepWords; }
};

template <typename Right>
void fill(const Panel& panel, const Right& right) {
  constexpr int64_t kPiece = 8;  // steps, for one task
  const int64_t pieces = ceil_div(panel.steps, kPiece);
  parallel_for(panel.tiles() * pieces, [&](int64_t task) {
    const int64_t tile = task / pieces, first = task % pieces * kPiece;
    for (int64_t step = first; step < smaller(panel.steps, first + kPiece); ++step) {
      right.pack(step * kStep, panel.col + tile * kTile, panel.at(tile, step));
    }
  });
}

// Some steps of a chain with a pair of the panel's tiles.
struct Block {
  int64_t first, end, split_end, pair;
};

// multiply_block() for it. The fewer pairs there are, the more lines each fetches.
template <typename Left>
float* multiply_pair(const LeftTiles<Left>& left, float* step, const Block& block, const Panel& panel, const Ahead& ahead,
                     const BlockSums& sums) {
  const int64_t pairs = panel.pairs(), step_bytes = kGroupRows * kStep * ahead.element;
  const Lines lines{static_cast<const char*>(ahead.at) + block.first * step_bytes + block.pair * step_bytes / pairs, step_bytes};
  const bool two = 2 * block.pair + 1 < panel.tiles();
  const float* const right0 = panel.at(2 * block.pair, block.first);
  const float* const right1 = two ? panel.at(2 * block.pair + 1, block.first) : right0;
  const auto multiply = [&]<int kLines>() {
    const auto multiply = two ? multiply_block<2, kLines, Left> : multiply_block<1, kLines, Left>;
    return multiply(left, step, block.first, block.end, block.split_end, right0, right1, lines, sums);
  };
  if (pairs == 1) return multiply.template operator()<11>();
  if (pairs == 2) return multiply.template operator()<6>();
  if (pairs <= 4) return multiply.template operator()<3>();
  return multiply.template operator()<2>();
}

// What a thread needs to walk through groups of the left factor.
template <typename Left>
class Walker {
 public:
  Walker(const Left& left, const Panel& panel)
      : panel_(panel),
        stride_(2 * kTile * panel.pairs()),
        block_steps_(panel.pairs() == 1 ? kChainSteps : kBlockSteps),  // of one pair nobody needs a step again
        sums_(thread_scratch(ScratchSlot::kLinearTiles, 2 * kGroupRows * stride_ + LeftTiles<Left>::floats(kBlockSteps + 1))),
        chain_(sums_ + kGroupRows * stride_),
        left_(left, panel.steps, panel.pairs() == 1 ? 2 : kBlockSteps + 1, chain_ + kGroupRows * stride_) {}

  const float* sums() const { return sums_; }  // [kGroupRows, columns of the panel]
  int64_t stride() const { return stride_; }

  // The sums of rows [row, row + kGroupRows). The next ones, from `next_row` on, are fetched.
  void multiply(int64_t row, int64_t next_row, const Ahead& ahead) {
    left_.enter(row, next_row);
    float* step = left_.first();
    for (int64_t chain = 0; chain < panel_.steps; chain += kChainSteps) {
      const int64_t chain_end = smaller(panel_.steps, chain + kChainSteps);
      for (int64_t first = chain; first < chain_end; first += block_steps_) {
        const int64_t end = smaller(chain_end, first + block_steps_);
        step = multiply_steps(step, first, end, next_row >= 0, ahead, {chain == 0 ? sums_ : chain_, stride_, first > chain});
      }
      if (chain > 0) add_chain();
    }
    left_.leave(step);
  }

 private:
  float* multiply_steps(float* step, int64_t first, int64_t end, bool goes_on, const Ahead& ahead, BlockSums sums) {
    float* after = step;
    for (int64_t pair = 0; pair < panel_.pairs(); ++pair, sums.base += 2 * kTile) {
      const int64_t split_end = pair > 0 ? 0 : end < panel_.steps || goes_on ? end + 1 : end;
      after = multiply_pair(left_, step, {first, end, split_end, pair}, panel_, ahead, sums);
    }
    return after;
  }

  void add_chain() {
    for (int64_t r = 0; r < kGroupRows; ++r) {
      for (int64_t i = r * stride_; i < r * stride_ + panel_.tiles() * kTile; i += Vec::width) {
        (Vec::load(sums_ + i) + Vec::load(chain_ + i)).store(sums_ + i);
      }
    }
  }

  const TileRegisters registers_;
  const Panel& panel_;
  int64_t stride_, block_steps_;
  float *sums_, *chain_;
  LeftTiles<Left> left_;
};

// Products of all rows of the left factor with all columns of the right one; store(row, sums, stride, col, cols) takes those of
// kGroupRows rows from `row` on, some of which may lie beyond the last, with columns [col, col + cols).
template <typename Left, typename Right, typename Store>
void product(const Left& left, const Right& right, const Store& store) {
  const int64_t steps = steps_of(left.depth), groups = ceil_div(left.rows, kGroupRows);
  const int64_t fitting = larger(2, kPanelFloats / (steps * kPanelStepWords) / 2 * 2);
  const int64_t most = smaller(kMostTiles, fitting) * kTile, tiles = ceil_div(smaller(most, right.cols), kTile);
  float* const words = thread_scratch(ScratchSlot::kLinear, tiles * steps * kPanelStepWords);
  for (int64_t col = 0; col < right.cols; col += most) {
    const Panel panel{words, col, smaller(most, right.cols - col), steps};
    fill(panel, right);
    const int64_t worthwhile = larger(1, ceil_div(groups * kGroupRows * steps * kStep * (panel.cols + 8), kTaskWork));
    const auto prepare = [&] { return Walker<Left>(left, panel); };
    parallel_walk(groups, smaller(worthwhile, thread_count()), prepare, [&](Walker<Left>& walker, int64_t i, int64_t end) {
      const int64_t row = i * kGroupRows, next_row = i + 1 < end ? row + kGroupRows : -1;
      walker.multiply(row, next_row, left.ahead(next_row < 0 ? left.rows : next_row));
      store(row, walker.sums(), walker.stride(), col, panel.cols);
    });
  }
}

template <typename Element>
void linear_with(const LinearArgs& args, const Element* w) {
  const RowsOf<Element> weights{w, args.ldw, args.N, args.K};
  product(weights, RowsAsColumns{args.x, args.ldx, args.M, args.K},
          [&](int64_t col, const float* sums, int64_t stride, int64_t row, int64_t rows) {
            finish_lanes(args, sums, stride, row, rows, col, smaller(kGroupRows, args.N - col));
          });
}

}  // namespace

void linear(const LinearArgs& args) {
  if (args.M <= 0 || args.N <= 0) return;
  if (args.w.type == Weight::Type::kFloat32) {
    linear_with(args, static_cast<const float*>(args.w.data));
  } else {
    linear_with(args, static_cast<const BFloat16*>(args.w.data));
  }
}

void matmul(const MatmulArgs& args) {
  if (args.M <= 0 || args.N <= 0) return;
  const Matrix b{args.b, args.ldb, args.N, args.K};
  const auto store = [&](int64_t row, const float* sums, int64_t stride, int64_t col, int64_t cols) {
    for (int64_t r = 0; r < smaller(kGroupRows, args.M - row); ++r) {
      float* y = args.y + (row + r) * args.ldy + col;
      for_each_vec(cols, [&](int64_t c, int64_t lanes) { Vec::load(sums + r * stride + c).store(y + c, lanes); });
    }
  };
  if (args.a_col == 1) {
    product(RowsOf<float>{args.a, args.a_row, args.M, args.K}, b, store);
  } else {
    product(ColumnsOf{args.a, args.a_col, args.M, args.K}, b, store);
  }
}

}  // namespace hybrid::HYBRID_ISA
