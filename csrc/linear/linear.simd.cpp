// y = alpha * x w^T + bias + residual, straight from w's training layout [N, K].
//
// K is summed in chains of kChain products, whose totals are added in order (tile.h): the same bits for every M, and the error
// of a blocked sum. Two ways through the same sums, by the number of rows of x:
// Strips, very few rows: a unit is a strip of Vec::width weight rows, or two; every weight is read once from memory and
// transposed in registers; bfloat16 as pairs (element.h). Bound by reading w.
// Lanes, more: x is transposed once and lies along the vector; a unit is a group of kGroupRows weight rows against a chunk of
// x's, and every weight is broadcast from where it lies. Bound by reading w up to some 12 rows, by arithmetic beyond.
// Threads walk through neighbouring units, and fetch the next one's weights ahead.
// matmul, for the backward, has a third way: panels of its right factor are copied into L1, a chain at a time.
#include "common/parallel.h"
#include "common/vec.h"
#include "linear/finish.h"
#include "linear/lanes.h"
#include "linear/linear.h"
#include "linear/scratch.h"
#include "linear/tile.h"

namespace hybrid::HYBRID_ISA {
namespace {

constexpr int64_t kChain = 128;         // products in a chain; of a panel they are 16 KiB at most: half of an L1
constexpr int64_t kChunkRows = 256;     // their sums are 48 KiB at most, and their x stays in L2
constexpr int64_t kTaskWork = 1 << 20;  // multiply-adds that are worth handing to a thread

// Calls body(i, next) for each of `units` equal pieces of work. `next` is the one that the same thread will get after i, as far
// as that is known; otherwise i again. Only as many threads take part as have enough to do.
template <typename Body>
void for_each_unit(int64_t units, int64_t work_per_unit, const Body& body) {
  const int64_t worthwhile = larger(1, ceil_div(units * work_per_unit, kTaskWork));
  parallel_walk(units, smaller(worthwhile, thread_count()), [&](int64_t i, int64_t end) { body(i, i + 1 < end ? i + 1 : i); });
}

// rows of w at most `depth` deep as floats, with rows of zeros up to padded_rows; out's stride is kChain.
template <typename Element>
void pad_rows(const Element* w, int64_t stride, int64_t rows, int64_t padded_rows, int64_t depth, float* out) {
  for (int64_t r = 0; r < padded_rows; ++r) {
    for (int64_t k = 0; k < depth; ++k) out[r * kChain + k] = r < rows ? to_float(w[r * stride + k]) : 0.0f;
  }
}

// Rows [first, first + count) of x and of what belongs to them.
LinearArgs rows_of(const LinearArgs& args, int64_t first, int64_t count) {
  LinearArgs rows = args;
  rows.x += first * args.ldx;
  rows.y += first * args.ldy;
  if (args.residual != nullptr) rows.residual += first * args.ldr;
  rows.M = count;
  return rows;
}

// Weight rows from `col` on, if they lie without gaps.
template <typename Element>
Ahead weight_ahead(const LinearArgs& args, const Element* w, int64_t col) {
  if (args.ldw != args.K) return Ahead::nothing(args.x);
  return {w + col * args.ldw, sizeof(Element)};
}

// kStrips strips of Vec::width weight rows, from `col` on, against all rows of x: at most kStripRows, or kTwinRows for two.
// Meanwhile those from `next_col` on are fetched.
template <int kStrips, typename Element>
void strip(const LinearArgs& args, const Element* w, int64_t col, int64_t next_col) {
  constexpr int64_t kCols = kStrips * Vec::width;
  const int64_t cols = smaller(kCols, args.N - col);
  const Ahead ahead = weight_ahead(args, w, next_col);
  alignas(64) float sums[kStripRows * kCols];
  int64_t k = 0;
  do {
    const int64_t depth = smaller(kChain, args.K - k);
    const auto multiply = [&](const auto* rows, int64_t stride) {
      const Factor x{args.x + k, args.ldx, 1};
      const Sums to{sums, kCols, k > 0};
      if constexpr (kStrips == 2) {
        multiply_twin_strips(args.M, x, rows, stride, depth, ahead.after(k * kCols), to);
      } else {
        multiply_strip(args.M, x, rows, stride, depth, ahead.after(k * kCols), to);
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
  for (int64_t row = 0; row < args.M; ++row) {
    for_each_vec(cols, [&](int64_t c, int64_t lanes) { finish(args, Vec::load(sums + row * kCols + c), row, col + c, lanes); });
  }
}

template <int kStrips, typename Element>
void strips(const LinearArgs& args, const Element* w) {
  constexpr int64_t kCols = kStrips * Vec::width;
  const int64_t count = ceil_div(args.N, kCols);
  const int64_t work = kCols * args.K * (args.M + 8);  // 8: reading costs as 8 rows do
  for_each_unit(count, work, [&](int64_t i, int64_t next) { strip<kStrips>(args, w, i * kCols, next * kCols); });
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

// One group of kGroupRows weight rows, from `col` on, against at most kChunkRows rows of x, which wait in `panels` (lanes.h).
// Meanwhile the group from `next_col` on is fetched.
template <typename Element>
void lane_group(const LinearArgs& args, const Element* w, const float* panels, int64_t col, int64_t next_col) {
  const int64_t cols = smaller(kGroupRows, args.N - col);
  const Ahead ahead = weight_ahead(args, w, next_col);
  alignas(64) float sums[kGroupRows * kChunkRows], buffer[kGroupRows * kChain];
  int64_t k = 0;
  do {
    const int64_t depth = smaller(kChain, args.K - k);
    const Floats rows = floats_of(w + col * args.ldw + k, args.ldw, cols, depth, buffer);
    for (int64_t row = 0; row < args.M; row += kPanelLanes) {
      const int64_t lanes = lanes_for(args.M - row);
      const float* panel = panels + row * padded_depth(args.K) + k * lanes;
      multiply_lanes(cols, lanes, rows.base, rows.stride, panel, depth,
                     row == 0 ? ahead.after(k * kGroupRows) : Ahead::nothing(panel), {sums + row, kChunkRows, k > 0});
    }
    k += kChain;
  } while (k < args.K);
  for (int64_t row = 0; row < args.M; row += kPanelLanes) {
    finish_lanes(args, sums + row, kChunkRows, row, smaller(kPanelLanes, args.M - row), col, cols);
  }
}

// x to panels (lanes.h).
void pack_panels(const LinearArgs& args, float* panels) {
  constexpr int64_t kPiece = 4 * kChain;  // of x's columns, for one task
  const int64_t pieces = larger(1, args.K / kPiece);
  parallel_for(ceil_div(args.M, kPanelLanes) * pieces, [&](int64_t task) {
    const int64_t row = task / pieces * kPanelLanes, piece = task % pieces;
    pack_lanes(args.x + row * args.ldx, args.ldx, smaller(kPanelLanes, args.M - row), piece * kPiece,
               piece + 1 < pieces ? (piece + 1) * kPiece : args.K, panels + row * padded_depth(args.K));
  });
}

template <typename Element>
void lanes(const LinearArgs& args, const Element* w) {
  float* panels = thread_scratch(ScratchSlot::kLinear, ceil_div(args.M, kPanelLanes) * kPanelLanes * padded_depth(args.K));
  pack_panels(args, panels);
  const int64_t groups = ceil_div(args.N, kGroupRows), chunks = ceil_div(args.M, kChunkRows);
  const int64_t work = kGroupRows * args.K * (smaller(args.M, kChunkRows) + 8);
  for_each_unit(chunks * groups, work, [&](int64_t i, int64_t next) {
    const int64_t first = i / groups * kChunkRows;
    lane_group(rows_of(args, first, smaller(kChunkRows, args.M - first)), w, panels + first * padded_depth(args.K),
               i % groups * kGroupRows, next % groups * kGroupRows);
  });
}

// Of very many rows so many at a time that every thread has some units: their panels stay in L2, and take little memory.
template <typename Element>
void chunked_lanes(const LinearArgs& args, const Element* w) {
  const int64_t chunks = ceil_div(4 * thread_count(), ceil_div(args.N, kGroupRows));
  const int64_t at_once = chunks * kChunkRows;
  for (int64_t first = 0; first < args.M; first += at_once) {
    lanes(rows_of(args, first, smaller(at_once, args.M - first)), w);
  }
}

// packed[k][c] = b[k, c] for c < cols; zero up to packed_cols.
void pack_columns(const float* b, int64_t stride, int64_t cols, int64_t depth, float* packed, int64_t packed_cols) {
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t c = 0; c < packed_cols; c += Vec::width) {
      const float* piece = b + k * stride + c;
      (cols - c >= Vec::width ? Vec::load(piece) : Vec::load(piece, cols - c)).store(packed + k * kPanelCols + c);
    }
  }
}

// Columns [col, col + kPanelCols) of b against rows [first, first + rows) of a.
void panel_rows(const MatmulArgs& args, int64_t col, int64_t first, int64_t rows) {
  float* panel = thread_scratch(ScratchSlot::kLinear, kChain * kPanelCols + rows * kPanelCols);
  float* sums = panel + kChain * kPanelCols;
  const int64_t cols = smaller(kPanelCols, args.N - col);
  const int64_t packed_cols = cols <= Vec::width ? Vec::width : kPanelCols;
  const int64_t block_rows = ceil_div(rows, ceil_div(rows, kPanelRows));
  const Factor a{args.a, args.a_row, args.a_col};
  int64_t k = 0;
  do {
    const int64_t depth = smaller(kChain, args.K - k);
    pack_columns(args.b + k * args.ldb + col, args.ldb, cols, depth, panel, packed_cols);
    for (int64_t row = 0; row < rows; row += block_rows) {
      const int64_t block = smaller(block_rows, rows - row);
      multiply_panel(block, packed_cols, a.from(first + row, k), panel, kPanelCols, depth,
                     {sums + row * kPanelCols, kPanelCols, k > 0});
    }
    k += depth;
  } while (k < args.K);
  for (int64_t row = 0; row < rows; ++row) {
    for_each_vec(cols, [&](int64_t c, int64_t lanes) {
      Vec::load(sums + row * kPanelCols + c).store(args.y + (first + row) * args.ldy + col + c, lanes);
    });
  }
}

template <typename Element>
void linear_with(const LinearArgs& args, const Element* w) {
  if (args.M <= kTwinRows) {
    strips<2>(args, w);
  } else if (args.M <= kStripRows) {
    strips<1>(args, w);
  } else {
    chunked_lanes(args, w);
  }
}

}  // namespace

void linear(const LinearArgs& args) {
  if (args.M <= 0 || args.N <= 0) return;
  with_elements(args.w, [&](const auto* w) { linear_with(args, w); });
}

void matmul(const MatmulArgs& args) {
  if (args.M <= 0 || args.N <= 0) return;
  const int64_t panels = ceil_div(args.N, kPanelCols);
  // Chunks shrink while there are too few panels to share, down to four register tiles.
  const int64_t wanted = ceil_div(4 * thread_count(), panels);
  const int64_t chunk = smaller(kChunkRows, larger(4 * kPanelRows, ceil_div(args.M, wanted)));
  const int64_t chunks = ceil_div(args.M, chunk);
  const int64_t rows = ceil_div(args.M, chunks);
  for_each_unit(chunks * panels, rows * kPanelCols * args.K, [&](int64_t i, int64_t) {
    const int64_t first = i / panels * rows;
    panel_rows(args, i % panels * kPanelCols, first, smaller(rows, args.M - first));
  });
}

}  // namespace hybrid::HYBRID_ISA
