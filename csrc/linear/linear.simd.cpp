// y = alpha * x w^T + bias + residual, straight from w's training layout [N, K].
//
// K is summed in chains of kChain products, whose totals are added in order (tile.h): the same bits for every M, and the error
// of a blocked sum. Three ways through the same sums, by the number of rows of x:
// Strips, very few rows: a task owns some strips of Vec::width weight rows; every weight is read once from memory and
// transposed in registers; bfloat16 as pairs (element.h). Bound by reading w.
// Lanes, a decoded batch: x is transposed once and lies along the vector; a task owns some groups of kGroupRows weight rows,
// and every weight is broadcast from where it lies. Bound by reading w up to some 12 rows, by arithmetic beyond.
// Panels, many rows: a task owns some panels of kPanelCols weight rows and a chunk of x's rows. A panel is packed into L1 a
// K-block at a time and used by the whole chunk; totals wait in a small buffer between K-blocks. Bound by arithmetic.
// matmul, for the backward, is the third way with other strides.
#include "common/parallel.h"
#include "common/vec.h"
#include "linear/lanes.h"
#include "linear/linear.h"
#include "linear/scratch.h"
#include "linear/tile.h"

namespace hybrid::HYBRID_ISA {
namespace {

// Measured: the most rows for each way.
constexpr int64_t kStripPathRows = kStripRows;
constexpr int64_t kLanePathRows = 128;

constexpr int64_t kChain = 128;         // products in a chain; a packed block of them is 16 KiB at most: half of an L1
constexpr int64_t kChunkRows = 256;     // their sums are 32 KiB at most, and their x stays in L2
constexpr int64_t kTaskWork = 1 << 20;  // multiply-adds that are worth handing to a thread

// y[row .. row + rows, col .. col + cols) from finished sums. The one place where anything is added to them.
void finish(const LinearArgs& args, const float* sums, int64_t stride, int64_t row, int64_t rows, int64_t col, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* residual = args.residual != nullptr ? args.residual + (row + r) * args.ldr + col : nullptr;
    float* y = args.y + (row + r) * args.ldy + col;
    for_each_vec(cols, [&](int64_t c, int64_t lanes) {
      const Vec bias = args.bias != nullptr ? Vec::load(args.bias + col + c, lanes) : Vec();
      Vec out = fma(Vec::load(sums + r * stride + c), Vec(args.alpha), bias);
      if (residual != nullptr) out += Vec::load(residual + c, lanes);
      out.store(y + c, lanes);
    });
  }
}

// How many of `units` equal pieces make one task: enough work each, and enough tasks for the team to share evenly.
int64_t units_per_task(int64_t units, int64_t work_per_unit) {
  const int64_t worthwhile = ceil_div(kTaskWork, larger(1, work_per_unit));
  const int64_t shareable = ceil_div(units, 4 * thread_count());
  return larger(1, smaller(worthwhile, shareable));
}

// Calls body(i, next) for each of `units` pieces of the weight, shared out in tasks. `next` is the piece that the same thread
// is likely to get after i: tasks are handed out in order, so of equally fast threads each gets every threads-th. It may lie
// beyond the last.
template <typename Body>
void for_each_unit(int64_t units, int64_t work_per_unit, const Body& body) {
  const int64_t share = units_per_task(units, work_per_unit), threads = thread_count();
  parallel_for(ceil_div(units, share), [&](int64_t task) {
    const int64_t end = smaller(units, (task + 1) * share);
    for (int64_t i = task * share; i < end; ++i) body(i, i + 1 < end ? i + 1 : (task + threads) * share);
  });
}

// rows of w at most `depth` deep as floats, with rows of zeros up to padded_rows; out's stride is kChain.
template <typename Element>
void pad_rows(const Element* w, int64_t stride, int64_t rows, int64_t padded_rows, int64_t depth, float* out) {
  for (int64_t r = 0; r < padded_rows; ++r) {
    for (int64_t k = 0; k < depth; ++k) out[r * kChain + k] = r < rows ? to_float(w[r * stride + k]) : 0.0f;
  }
}

// kStrips strips of Vec::width weight rows, from `col` on, against all rows of x: at most kStripRows, or kTwinRows for two.
// Meanwhile those from `next_col` on are fetched.
template <int kStrips, typename Element>
void strip(const LinearArgs& args, const Element* w, int64_t col, int64_t next_col) {
  constexpr int64_t kCols = kStrips * Vec::width;
  const int64_t cols = smaller(kCols, args.N - col);
  const Prefetch next(w + next_col * args.ldw, args.ldw, smaller(kCols, args.N - next_col), args.K);
  alignas(64) float sums[kStripRows * kCols];
  int64_t k = 0;
  do {
    const int64_t depth = smaller(kChain, args.K - k);
    const auto multiply = [&](const auto* rows, int64_t stride) {
      const Factor x{args.x + k, args.ldx, 1};
      const Sums to{sums, kCols, k > 0};
      if constexpr (kStrips == 2) {
        multiply_twin_strips(args.M, x, rows, stride, depth, next.from(k), to);
      } else {
        multiply_strip(args.M, x, rows, stride, depth, next.from(k), to);
      }
    };
    if (cols == kCols) {
      multiply(w + col * args.ldw + k, args.ldw);
    } else {
      alignas(64) float padded[kCols * kChain];
      pad_rows(w + col * args.ldw + k, args.ldw, cols, kCols, depth, padded);
      multiply(padded, kChain);
    }
    k += kChain;
  } while (k < args.K);
  finish(args, sums, kCols, 0, args.M, col, cols);
}

template <int kStrips, typename Element>
void strips(const LinearArgs& args, const Element* w) {
  constexpr int64_t kCols = kStrips * Vec::width;
  const int64_t count = ceil_div(args.N, kCols);
  const int64_t work = kCols * args.K * (args.M + 8);  // 8: reading costs as 8 rows do
  for_each_unit(count, work, [&](int64_t i, int64_t next) { strip<kStrips>(args, w, i * kCols, next * kCols); });
}

// sums [cols, lanes] of one panel of x to y[row .. row + rows, col .. col + cols).
void finish_lanes(const LinearArgs& args, const float* sums, int64_t stride, int64_t row, int64_t rows, int64_t col,
                  int64_t cols) {
  alignas(64) float turned[Vec::width * kGroupRows];
  for (int64_t lane = 0; lane < rows; lane += Vec::width) {
    for (int64_t c = 0; c < cols; c += Vec::width) {
      Vec t[Vec::width];
      load_transposed(sums + c * stride + lane, stride, t);
#pragma GCC unroll 16
      for (int i = 0; i < Vec::width; ++i) t[i].store(turned + i * kGroupRows + c);
    }
    finish(args, turned, kGroupRows, row + lane, smaller(Vec::width, rows - lane), col, cols);
  }
}

// Where to find rows of a weight as floats.
struct Floats {
  const float* base;
  int64_t stride;
};

void widen_row(const BFloat16* from, int64_t count, float* to) {
  const int64_t whole = count / Vec::width * Vec::width;
  for (int64_t k = 0; k < whole; k += Vec::width) load_floats(from + k).store(to + k);
  for (int64_t k = whole; k < count; ++k) to[k] = to_float(from[k]);
}

// rows of w at most kChain deep as floats: where they lie, or widened into `buffer` ([rows, kChain]).
Floats floats_of(const float* w, int64_t stride, int64_t, int64_t, float*) { return {w, stride}; }

Floats floats_of(const BFloat16* w, int64_t stride, int64_t rows, int64_t depth, float* buffer) {
  for (int64_t r = 0; r < rows; ++r) widen_row(w + r * stride, depth, buffer + r * kChain);
  return {buffer, kChain};
}

// One group of kGroupRows weight rows, from `col` on, against all rows of x, which wait in `panels` (lanes.h). Meanwhile the
// group from `next_col` on is fetched.
template <typename Element>
void lane_group(const LinearArgs& args, const Element* w, const float* panels, int64_t col, int64_t next_col) {
  const int64_t cols = smaller(kGroupRows, args.N - col);
  const Prefetch next(w + next_col * args.ldw, args.ldw, smaller(kGroupRows, args.N - next_col), args.K);
  alignas(64) float sums[kGroupRows * kLanePathRows], buffer[kGroupRows * kChain];
  int64_t k = 0;
  do {
    const int64_t depth = smaller(kChain, args.K - k);
    const Floats rows = floats_of(w + col * args.ldw + k, args.ldw, cols, depth, buffer);
    for (int64_t row = 0; row < args.M; row += kPanelLanes) {
      const int64_t lanes = lanes_for(args.M - row);
      const float* panel = panels + row * padded_depth(args.K) + k * lanes;
      multiply_lanes(cols, lanes, rows.base, rows.stride, panel, depth, row == 0 ? next.from(k) : Prefetch(),
                     {sums + row, kLanePathRows, k > 0});
    }
    k += kChain;
  } while (k < args.K);
  for (int64_t row = 0; row < args.M; row += kPanelLanes) {
    finish_lanes(args, sums + row, kLanePathRows, row, smaller(kPanelLanes, args.M - row), col, cols);
  }
}

template <typename Element>
void lanes(const LinearArgs& args, const Element* w) {
  constexpr int64_t kPiece = 4 * kChain;  // of x's columns, for one task
  const int64_t pieces = larger(1, args.K / kPiece);
  float* panels = thread_scratch(ScratchSlot::kLinear, ceil_div(args.M, kPanelLanes) * kPanelLanes * padded_depth(args.K));
  parallel_for(ceil_div(args.M, kPanelLanes) * pieces, [&](int64_t task) {
    const int64_t row = task / pieces * kPanelLanes, piece = task % pieces;
    pack_lanes(args.x + row * args.ldx, args.ldx, smaller(kPanelLanes, args.M - row), piece * kPiece,
               piece + 1 < pieces ? (piece + 1) * kPiece : args.K, panels + row * padded_depth(args.K));
  });
  const int64_t count = ceil_div(args.N, kGroupRows);
  for_each_unit(count, kGroupRows * args.K * (args.M + 8), [&](int64_t i, int64_t next) {
    lane_group(args, w, panels, i * kGroupRows, next * kGroupRows);
  });
}

// The right factor of the third way. pack: packed[k][c] = element (first_k + k, col + c) for c < cols, zero up to packed_cols.
template <typename Element>
struct WeightColumns {  // stored [N, K]
  const Element* w;
  int64_t stride;
  void pack(int64_t col, int64_t cols, int64_t first_k, int64_t depth, float* packed, int64_t packed_cols) const {
    pack_transposed(w + col * stride + first_k, stride, cols, depth, packed, packed_cols, kPanelCols);
  }
};

struct MatrixColumns {  // stored [K, N]
  const float* b;
  int64_t stride;
  void pack(int64_t col, int64_t cols, int64_t first_k, int64_t depth, float* packed, int64_t packed_cols) const {
    for (int64_t k = 0; k < depth; ++k) {
      const float* row = b + (first_k + k) * stride + col;
      for (int64_t c = 0; c < packed_cols; c += Vec::width) {
        const Vec piece = cols - c >= Vec::width ? Vec::load(row + c) : Vec::load(row + c, cols - c);
        piece.store(packed + k * kPanelCols + c);
      }
    }
  }
};

// One panel of columns [col, col + kPanelCols) against rows [first, first + rows) of x.
template <typename Columns>
void panel_rows(const LinearArgs& args, const Factor& x, const Columns& columns, int64_t col, int64_t first, int64_t rows) {
  float* panel = thread_scratch(ScratchSlot::kLinear, kChain * kPanelCols + rows * kPanelCols);
  float* sums = panel + kChain * kPanelCols;
  const int64_t cols = smaller(kPanelCols, args.N - col);
  const int64_t packed_cols = cols <= Vec::width ? Vec::width : kPanelCols;
  const int64_t block_rows = ceil_div(rows, ceil_div(rows, kPanelRows));
  int64_t k = 0;
  do {
    const int64_t depth = smaller(kChain, args.K - k);
    columns.pack(col, cols, k, depth, panel, packed_cols);
    for (int64_t row = 0; row < rows; row += block_rows) {
      const int64_t block = smaller(block_rows, rows - row);
      float* block_sums = sums + row * kPanelCols;
      multiply_panel(block, packed_cols, x.from(first + row, k), panel, kPanelCols, depth,
                     {block_sums, kPanelCols, k > 0});
      if (k + depth >= args.K) finish(args, block_sums, kPanelCols, first + row, block, col, cols);
    }
    k += depth;
  } while (k < args.K);
}

template <typename Columns>
void panels(const LinearArgs& args, const Factor& x, const Columns& columns) {
  const int64_t count = ceil_div(args.N, kPanelCols);
  // Chunks shrink while there are too few panels to share, down to four register tiles.
  const int64_t wanted = ceil_div(4 * thread_count(), count);
  const int64_t chunk = smaller(kChunkRows, larger(4 * kPanelRows, ceil_div(args.M, wanted)));
  const int64_t chunks = ceil_div(args.M, chunk);
  const int64_t chunk_rows = ceil_div(args.M, chunks);
  const int64_t group = units_per_task(count, chunk_rows * kPanelCols * args.K);
  const int64_t groups = ceil_div(count, group);
  parallel_for(chunks * groups, [&](int64_t task) {
    const int64_t first = task / groups * chunk_rows;
    const int64_t begin = task % groups * group;
    const int64_t end = smaller(count, begin + group);
    for (int64_t panel = begin; panel < end; ++panel) {
      panel_rows(args, x, columns, panel * kPanelCols, first, smaller(chunk_rows, args.M - first));
    }
  });
}

template <typename Element>
void linear_with(const LinearArgs& args, const Element* w) {
  if (args.M <= kTwinRows) {
    strips<2>(args, w);
  } else if (args.M <= kStripPathRows) {
    strips<1>(args, w);
  } else if (args.M <= kLanePathRows) {
    lanes(args, w);
  } else {
    panels(args, {args.x, args.ldx, 1}, WeightColumns<Element>{w, args.ldw});
  }
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
  panels({.y = args.y, .ldy = args.ldy, .M = args.M, .N = args.N, .K = args.K}, {args.a, args.a_row, args.a_col},
         MatrixColumns{args.b, args.ldb});
}

}  // namespace hybrid::HYBRID_ISA
