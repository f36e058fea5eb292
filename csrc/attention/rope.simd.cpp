// Rotary embedding, the append to the paged cache, and both in one. All move every element once: bound by memory.
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

// How the heads of one row turn.
struct Rotation {
  const float *cos, *sin;  // [half], of the row's position
  int64_t half, head_dim;

  Rotation(const RopeArgs& args, int64_t row)
      : cos(args.cos + args.positions[row] * (args.rotary_dim / 2)),
        sin(args.sin + args.positions[row] * (args.rotary_dim / 2)),
        half(args.rotary_dim / 2),
        head_dim(args.head_dim) {}

  void turn(const float* in, float* out) const {
    for_each_vec(half, [&](int64_t i, int64_t lanes) {
      const Vec first = Vec::load(in + i, lanes), second = Vec::load(in + half + i, lanes);
      const Vec c = Vec::load(cos + i, lanes), s = Vec::load(sin + i, lanes);
      fma(first, c, -(second * s)).store(out + i, lanes);
      fma(second, c, first * s).store(out + half + i, lanes);
    });
    if (out != in) {
      for (int64_t i = 2 * half; i < head_dim; ++i) out[i] = in[i];
    }
  }
};

void turn_row(const RopeArgs& args, int64_t row, const Rotation& rotation) {
  const float* in = args.in + row * args.in_stride;
  float* out = args.out + row * args.out_stride;
  for (int64_t i = 0; i < args.heads * args.head_dim; i += args.head_dim) rotation.turn(in + i, out + i);
}

// A row's place in the cache: its key of the first head.
float* slot_at(float* cache, int64_t slot, const KvCacheLayout& layout) {
  return cache + slot / kKvTile * layout.block_stride() + slot % kKvTile * layout.head_dim;
}

}  // namespace

void rope(const RopeArgs& args) {
  over_rows(args.rows, args.heads * args.head_dim, [&](int64_t row) { turn_row(args, row, Rotation(args, row)); });
}

void kv_append(const float* k, const float* v, int64_t row_stride, int64_t rows, const int64_t* slots,
               const KvCacheLayout& layout, float* cache) {
  const int64_t dim = layout.head_dim;
  over_rows(rows, 2 * layout.kv_heads * dim, [&](int64_t row) {
    float* slot = slot_at(cache, slots[row], layout);
    for (int64_t head = 0; head < layout.kv_heads; ++head) {
      memcpy(slot + head * layout.head_stride(), k + row * row_stride + head * dim, dim * sizeof(float));
      memcpy(slot + head * layout.head_stride() + layout.v_offset(), v + row * row_stride + head * dim, dim * sizeof(float));
    }
  });
}

void rope_append(const RopeAppendArgs& args) {
  const KvCacheLayout& layout = args.layout;
  const int64_t dim = layout.head_dim;
  over_rows(args.query.rows, (args.query.heads + 2 * layout.kv_heads) * dim, [&](int64_t row) {
    const Rotation rotation(args.query, row);
    turn_row(args.query, row, rotation);
    float* slot = slot_at(args.cache, args.slots[row], layout);
    for (int64_t head = 0; head < layout.kv_heads; ++head) {
      float* key = slot + head * layout.head_stride();
      rotation.turn(args.k + row * args.k_stride + head * dim, key);
      memcpy(key + layout.v_offset(), args.v + row * args.v_stride + head * dim, dim * sizeof(float));
    }
  });
}

}  // namespace hybrid::HYBRID_ISA
