// linear, linear_tiles and matmul on the matrix unit of processors that have one (AMX); matrix_unit.h says how it multiplies floats.
//
// Every thread splits the right factor, activations in linear, into a panel of its own, some columns at a time; it stays in L2.
// (To split a line again is some ten times as fast as to fetch it from another core.) Then it walks through groups of kGroupRows
// rows of the left one, weights in linear. A step of them is split, into L1, while the unit multiplies the step before, and the
// next group is fetched meanwhile: with few columns the weights pass by as fast as memory gives them.
//
// Every output is one sum in one order, whatever the numbers of rows, columns and threads: over depth by steps of 32, in chains of
// kChainSteps whose totals are added in order. Sums that leave the unit within a chain come back as they were.
// Bound by reading the weights up to some 32 rows of x, by the unit beyond.
#include "common/parallel.h"
#include "linear/finish.h"
#include "linear/linear.h"
#include "linear/matrix_block.h"
#include "linear/matrix_strip.h"
#include "linear/scratch.h"

namespace hybrid::HYBRID_ISA {
namespace {

constexpr int64_t kBlockSteps = 4;            // at most, that stay split in L1 while all pairs of column tiles pass
constexpr int64_t kPanelFloats = 256 * 1024;  // 1 MiB: half of an L2
constexpr int64_t kMostTiles = 16;            // of a panel; a group's sums with them are 32 KiB

// Columns [col, col + cols) of the right factor in tiles.
struct Panel {
  float* words;
  int64_t col, cols, steps;

  int64_t tiles() const { return ceil_div(cols, kTile); }
  int64_t pairs() const { return ceil_div(tiles(), 2); }
  int64_t floats() const { return tiles() * steps * kPanelStepWords; }
  float* at(int64_t tile, int64_t step) const { return words + (tile * steps + step) * kPanelStepWords; }

  template <typename Right>
  void fill(const Right& right) const {
    for (int64_t tile = 0; tile < tiles(); ++tile) {
      for (int64_t step = 0; step < steps; ++step) right.pack(step * kStep, col + tile * kTile, at(tile, step));
    }
  }
};

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
  const float* const right0 = panel.at(2 * block.pair, block.first);
  const auto multiply = [&]<int kRight, int kLines>() {
    const float* const right1 = kRight == 2 ? panel.at(2 * block.pair + 1, block.first) : right0;
    return multiply_block<kRight, kLines>(left, step, block.first, block.end, block.split_end, right0, right1, lines, sums);
  };
  const bool two = 2 * block.pair + 1 < panel.tiles();
  const auto with_lines = [&]<int kLines>() {
    return two ? multiply.template operator()<2, kLines>() : multiply.template operator()<1, kLines>();
  };
  if (pairs == 1) return with_lines.template operator()<11>();
  if (pairs == 2) return with_lines.template operator()<6>();
  if (pairs <= 4) return with_lines.template operator()<3>();
  return with_lines.template operator()<2>();
}

// What a thread needs to walk through groups of the left factor: a panel, and tiles.
template <typename Left>
class Walker {
 public:
  template <typename Right>
  Walker(const Left& left, const Right& right, Panel panel)
      : panel_(panel),
        stride_(2 * kTile * panel.pairs()),
        block_steps_(block_steps(panel.pairs())),
        sums_(thread_scratch(ScratchSlot::kLinearTiles, 2 * kGroupRows * stride_ + LeftTiles<Left>::floats(kBlockSteps + 1))),
        chain_(sums_ + kGroupRows * stride_),
        left_(left, panel.steps, panel.pairs() == 1 ? 2 : block_steps_ + 1, chain_ + kGroupRows * stride_) {
    panel_.words = thread_scratch(ScratchSlot::kLinear, panel_.floats());
    panel_.fill(right);
  }

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
  // Of one pair nobody needs a step again. Of two, L1 is better left to the panel; of more, the sums go in and out too often.
  static int64_t block_steps(int64_t pairs) { return pairs == 1 ? kChainSteps : pairs == 2 ? 2 : kBlockSteps; }

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
  Panel panel_;
  int64_t stride_, block_steps_;
  float *sums_, *chain_;
  LeftTiles<Left> left_;
};

// Products of all rows of the left factor with all columns of the right one; store(row, rows, sums, stride, col, cols) takes
// those of some rows with some columns. A thread takes `together` neighbouring groups at a time.
template <typename Left, typename Right, typename Store>
void product(const Left& left, const Right& right, const Store& store, int64_t together = 1) {
  const int64_t steps = steps_of(left.depth), groups = ceil_div(left.rows, kGroupRows), runs = ceil_div(groups, together);
  const int64_t most = smaller(kMostTiles, larger(2, kPanelFloats / (steps * kPanelStepWords) / 2 * 2)) * kTile;
  for (int64_t col = 0; col < right.cols; col += most) {
    const Panel panel{nullptr, col, smaller(most, right.cols - col), steps};
    const int64_t shares = smaller(smaller(shares_worthwhile(left.rows, steps, panel.cols), runs), thread_count());
    const auto prepare = [&] { return Walker<Left>(left, right, panel); };
    parallel_walk(runs, shares, prepare, [&](Walker<Left>& walker, int64_t i, int64_t end) {
      const int64_t last = smaller(groups, end * together) - 1;
      for (int64_t group = i * together; group < smaller(groups, (i + 1) * together); ++group) {
        const int64_t row = group * kGroupRows, next_row = group < last ? row + kGroupRows : -1;
        walker.multiply(row, next_row, left.ahead(next_row < 0 ? left.rows : next_row));
        store(row, smaller(kGroupRows, left.rows - row), walker.sums(), walker.stride(), col, panel.cols);
      }
    });
  }
}

template <typename Element>
void linear_with(const LinearArgs& args, const Element* w) {
  const RowsOf<Element> weights{w, args.ldw, args.N, args.K};
  if (args.M == 1) return linear_row(args, weights);
  product(weights, RowsAsColumns{args.x, args.ldx, args.M, args.K},
          [&](int64_t col, int64_t cols, const float* sums, int64_t stride, int64_t row, int64_t rows) {
            finish_lanes(args, sums, stride, row, rows, col, cols);
          });
}

}  // namespace

void linear(const LinearArgs& args) {
  if (args.M <= 0 || args.N <= 0) return;
  with_elements(args.w, [&](const auto* w) { linear_with(args, w); });
}

void linear_tiles(const LinearTilesArgs& args, const ConsumeTile& consume) {
  const RowsAsColumns x{args.x, args.ldx, args.M, args.K};
  const auto multiply = [&]<typename Element>(const Element* w) {
    const auto store = [&](int64_t col, int64_t cols, const float* sums, int64_t stride, int64_t row, int64_t rows) {
      const int64_t place = col % args.tile_cols;
      const LinearArgs tile{.y = thread_scratch(ScratchSlot::kHead, rows * args.tile_cols), .ldy = args.tile_cols};
      finish_lanes(tile, sums, stride, 0, rows, place, cols);
      if (place + cols == args.tile_cols || col + cols == args.N) consume(row, rows, col - place, place + cols, tile.y);
    };
    product(RowsOf<Element>{w, args.K, args.N, args.K}, x, store, args.tile_cols / kGroupRows);
  };
  if (args.M > 0 && args.N > 0) with_elements(args.w, multiply);
}

void matmul(const MatmulArgs& args) {
  if (args.M <= 0 || args.N <= 0) return;
  const Matrix b{args.b, args.ldb, args.N, args.K};
  const auto store = [&](int64_t row, int64_t rows, const float* sums, int64_t stride, int64_t col, int64_t cols) {
    for (int64_t r = 0; r < rows; ++r) {
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
