// y = alpha * x w^T + bias + residual, straight from w's training layout [N, K].
//
// K is summed in chains of kChain products, whose totals are added in order (tile.h): the same bits for every M, and the error
// of a blocked sum.
// Few rows: a task owns some strips of Vec::width weight rows; every weight is read once from memory and transposed in
// registers. Bound by reading w (4 N K bytes).
// Many rows: a task owns some panels of kPanelCols weight rows and a chunk of x's rows. A panel is packed into L1 a K-block at
// a time and used by the whole chunk; totals wait in a small buffer between K-blocks. Bound by arithmetic.
// matmul, for the backward, is the second way with other strides.
#include "common/parallel.h"
#include "common/vec.h"
#include "linear/linear.h"
#include "linear/scratch.h"
#include "linear/tile.h"

namespace hybrid::HYBRID_ISA {
namespace {

constexpr int64_t kStripPathRows = kVecWidth == 16 ? 4 * kStripRows : kStripRows;  // measured: above, packing wins
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
  const int64_t shareable = ceil_div(units, 4 * omp_get_max_threads());
  return larger(1, smaller(worthwhile, shareable));
}

// One strip of Vec::width weight rows (w padded to that many) against all rows of x.
void strip_rows(const LinearArgs& args, const float* w, int64_t ldw, const Prefetch& next, int64_t col, int64_t lanes) {
  const int64_t blocks = ceil_div(args.M, kStripRows);
  const int64_t block_rows = ceil_div(args.M, blocks);
  const int64_t share = ceil_div(Vec::width, blocks);  // each block fetches its share of the next strip
  int64_t fetched = 0;
  for (int64_t row = 0; row < args.M; row += block_rows, fetched += share) {
    const Prefetch part{next.base + fetched * next.stride, next.stride, larger(0, smaller(share, next.rows - fetched))};
    const int64_t rows = smaller(block_rows, args.M - row);
    alignas(64) float sums[kStripRows * Vec::width];
    int64_t k = 0;
    do {
      const Prefetch ahead = part.rows > 0 ? Prefetch{part.base + k, part.stride, part.rows} : Prefetch{};
      multiply_strip(rows, {args.x + row * args.ldx + k, args.ldx, 1}, w + k, ldw, smaller(kChain, args.K - k), ahead,
                     {sums, Vec::width, k > 0});
      k += kChain;
    } while (k < args.K);
    finish(args, sums, Vec::width, row, rows, col, lanes);
  }
}

void strips(const LinearArgs& args) {
  const int64_t count = ceil_div(args.N, Vec::width);
  const int64_t group = units_per_task(count, Vec::width * args.K * (args.M + 8));  // 8: reading costs as 8 rows do
  parallel_for(ceil_div(count, group), [&](int64_t task) {
    const int64_t end = smaller(count, (task + 1) * group);
    for (int64_t strip = task * group; strip < end; ++strip) {
      const int64_t col = strip * Vec::width;
      const float* w = args.w + col * args.ldw;
      const int64_t lanes = args.N - col;
      if (lanes < Vec::width) {  // the last strip: read a padded copy, not past the weight
        float* padded = thread_scratch(ScratchSlot::kLinear, Vec::width * args.K);
        for (int64_t r = 0; r < Vec::width; ++r) {
          for (int64_t k = 0; k < args.K; ++k) padded[r * args.K + k] = r < lanes ? w[r * args.ldw + k] : 0.0f;
        }
        strip_rows(args, padded, args.K, {}, col, lanes);
      } else {
        const bool more = args.N - col >= 2 * Vec::width;
        const Prefetch next{w + Vec::width * args.ldw, args.ldw, more ? Vec::width : 0};
        strip_rows(args, w, args.ldw, next, col, Vec::width);
      }
    }
  });
}

// How the right factor lies in memory: a weight [N, K], or [K, N].
enum class Layout { kColumnsAsRows, kRows };

// packed[k][c] = b[col + c, k] for c < cols, zero up to packed_cols.
template <Layout kLayout>
void pack_panel(const LinearArgs& args, int64_t col, int64_t cols, int64_t first_k, int64_t depth, float* packed,
                int64_t packed_cols) {
  if constexpr (kLayout == Layout::kColumnsAsRows) {
    pack_transposed(args.w + col * args.ldw + first_k, args.ldw, cols, depth, packed, packed_cols, kPanelCols);
  } else {
    for (int64_t k = 0; k < depth; ++k) {
      const float* row = args.w + (first_k + k) * args.ldw + col;
      for (int64_t c = 0; c < packed_cols; c += Vec::width) {
        const Vec piece = cols - c >= Vec::width ? Vec::load(row + c) : Vec::load(row + c, cols - c);
        piece.store(packed + k * kPanelCols + c);
      }
    }
  }
}

// One panel of columns [col, col + kPanelCols) against rows [first, first + rows) of x.
template <Layout kLayout>
void panel_rows(const LinearArgs& args, const Factor& x, int64_t col, int64_t first, int64_t rows) {
  float* panel = thread_scratch(ScratchSlot::kLinear, kChain * kPanelCols + rows * kPanelCols);
  float* sums = panel + kChain * kPanelCols;
  const int64_t cols = smaller(kPanelCols, args.N - col);
  const int64_t packed_cols = cols <= Vec::width ? Vec::width : kPanelCols;
  const int64_t block_rows = ceil_div(rows, ceil_div(rows, kPanelRows));
  int64_t k = 0;
  do {
    const int64_t depth = smaller(kChain, args.K - k);
    pack_panel<kLayout>(args, col, cols, k, depth, panel, packed_cols);
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

template <Layout kLayout>
void panels(const LinearArgs& args, const Factor& x) {
  const int64_t count = ceil_div(args.N, kPanelCols);
  // Chunks shrink while there are too few panels to share, down to four register tiles.
  const int64_t wanted = ceil_div(4 * omp_get_max_threads(), count);
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
      panel_rows<kLayout>(args, x, panel * kPanelCols, first, smaller(chunk_rows, args.M - first));
    }
  });
}

}  // namespace

void linear(const LinearArgs& args) {
  if (args.M <= 0 || args.N <= 0) return;
  if (args.M <= kStripPathRows) {
    strips(args);
  } else {
    panels<Layout::kColumnsAsRows>(args, {args.x, args.ldx, 1});
  }
}

void matmul(const MatmulArgs& args) {
  if (args.M <= 0 || args.N <= 0) return;
  panels<Layout::kRows>({.w = args.b, .ldw = args.ldb, .y = args.y, .ldy = args.ldy, .M = args.M, .N = args.N, .K = args.K},
                        {args.a, args.a_row, args.a_col});
}

}  // namespace hybrid::HYBRID_ISA
