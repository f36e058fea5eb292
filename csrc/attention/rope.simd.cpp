// Rotary embedding and the append to the paged cache. Both move every element once: bound by memory.
#include <string.h>

#include "attention/attention.h"
#include "common/parallel.h"
#include "common/vec.h"

namespace hybrid::HYBRID_ISA {
namespace {

constexpr int64_t kTaskFloats = 1 << 14;  // floats that are worth handing to a thread

int64_t rows_per_task(int64_t row_floats) {
  return row_floats >= kTaskFloats ? 1 : kTaskFloats / (row_floats > 0 ? row_floats : 1);
}

template <typename Fn>
void over_rows(int64_t rows, int64_t row_floats, const Fn& fn) {
  const int64_t chunk = rows_per_task(row_floats);
  parallel_for((rows + chunk - 1) / chunk, [&](int64_t task) {
    const int64_t end = (task + 1) * chunk < rows ? (task + 1) * chunk : rows;
    for (int64_t row = task * chunk; row < end; ++row) fn(row);
  });
}

}  // namespace

void rope(const RopeArgs& args) {
  const int64_t half = args.rotary_dim / 2;
  over_rows(args.rows, args.heads * args.head_dim, [&](int64_t row) {
    const float* cos = args.cos + args.positions[row] * half;
    const float* sin = args.sin + args.positions[row] * half;
    for (int64_t head = 0; head < args.heads; ++head) {
      const float* in = args.in + row * args.in_stride + head * args.head_dim;
      float* out = args.out + row * args.out_stride + head * args.head_dim;
      for_each_vec(half, [&](int64_t i, int64_t lanes) {
        const Vec first = Vec::load(in + i, lanes), second = Vec::load(in + half + i, lanes);
        const Vec c = Vec::load(cos + i, lanes), s = Vec::load(sin + i, lanes);
        fma(first, c, -(second * s)).store(out + i, lanes);
        fma(second, c, first * s).store(out + half + i, lanes);
      });
      if (out != in) {
        for (int64_t i = 2 * half; i < args.head_dim; ++i) out[i] = in[i];
      }
    }
  });
}

void kv_append(const float* k, const float* v, int64_t row_stride, int64_t rows, const int64_t* slots,
               const KvCacheLayout& layout, float* cache) {
  const int64_t dim = layout.head_dim;
  over_rows(rows, 2 * layout.kv_heads * dim, [&](int64_t row) {
    float* slot = cache + slots[row] / kKvTile * layout.block_stride() + slots[row] % kKvTile * dim;
    for (int64_t head = 0; head < layout.kv_heads; ++head) {
      memcpy(slot + head * layout.head_stride(), k + row * row_stride + head * dim, dim * sizeof(float));
      memcpy(slot + head * layout.head_stride() + layout.v_offset(), v + row * row_stride + head * dim, dim * sizeof(float));
    }
  });
}

}  // namespace hybrid::HYBRID_ISA
