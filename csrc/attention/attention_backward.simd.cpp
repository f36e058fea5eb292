// Causal attention, backward, for packed sequences.
//
// A task owns one sequence and one key/value head with all its query heads, so nothing is added to by two tasks. It walks blocks
// of query rows, and for each the key tiles that they see (FlashAttention-2, Dao, 2023):
//   p = exp(scores - lse)    dp = grad_out v^T    ds = p (dp - delta) scale,  delta = sum(grad_out * out)
//   grad_q += ds k           grad_k += ds^T q     grad_v += p^T grad_out
// Five products of 2 * head_dim flops a row and key, all by the register tiles of linear: bound by arithmetic.
#include <string.h>

#include "attention/attention.h"
#include "attention/plan.h"
#include "attention/rows.h"
#include "common/math.h"
#include "common/parallel.h"
#include "common/vec.h"
#include "linear/scratch.h"
#include "linear/tile.h"

namespace hybrid::HYBRID_ISA {
namespace {

class SequenceHead {
 public:
  SequenceHead(const AttentionBackwardArgs& args, int64_t sequence, int64_t kv_head)
      : args_(args),
        kv_head_(kv_head),
        first_token_(args.cu_seqlens[sequence]),
        tokens_(args.cu_seqlens[sequence + 1] - first_token_),
        dim_(args.head_dim),
        width_(round_up(args.head_dim)),
        group_(args.heads / args.kv_heads),
        block_(query_block_positions(group_)) {
    const int64_t rows = block_ * group_, tile = kKvTile * larger(dim_, Vec::width), all_keys = ceil_div(tokens_, kKvTile) * kKvTile;
    const int64_t floats =
        rows * (2 * dim_ + width_ + 2 * kKvTile + 2) + 2 * tile + 2 * all_keys * width_ + 11 * 16;
    Carve carve{thread_scratch(ScratchSlot::kAttention, floats)};
    q_ = carve.take(rows * dim_);
    grad_out_ = carve.take(rows * dim_);
    grad_q_ = carve.take(rows * width_);
    p_ = carve.take(rows * kKvTile);
    ds_ = carve.take(rows * kKvTile);
    delta_ = carve.take(rows);
    lse_ = carve.take(rows);
    keys_ = carve.take(tile);
    values_ = carve.take(tile);
    grad_k_ = carve.take(all_keys * width_);
    grad_v_ = carve.take(all_keys * width_);
    memset(grad_k_, 0, all_keys * width_ * sizeof(float));
    memset(grad_v_, 0, all_keys * width_ * sizeof(float));
  }

  void run() {
    for (first_ = 0; first_ < tokens_; first_ += block_) {
      rows_ = smaller(block_, tokens_ - first_) * group_;
      gather();
      const int64_t oldest = args_.window > 0 ? larger(0, first_ - args_.window + 1) : 0;
      const int64_t last = position(rows_ - 1);
      for (int64_t tile = oldest / kKvTile; tile * kKvTile <= last; ++tile) add_tile(tile * kKvTile);
      for (int64_t row = 0; row < rows_; ++row) {
        write(grad_q_ + row * width_, args_.grad_q + (token(row) * args_.heads + head(row)) * dim_);
      }
    }
    for (int64_t key = 0; key < tokens_; ++key) {
      const int64_t at = ((first_token_ + key) * args_.kv_heads + kv_head_) * dim_;
      write(grad_k_ + key * width_, args_.grad_k + at);
      write(grad_v_ + key * width_, args_.grad_v + at);
    }
  }

 private:
  int64_t position(int64_t row) const { return first_ + row / group_; }
  int64_t token(int64_t row) const { return first_token_ + position(row); }
  int64_t head(int64_t row) const { return kv_head_ * group_ + row % group_; }

  void gather() {
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t at = (token(row) * args_.heads + head(row)) * dim_;
      memcpy(q_ + row * dim_, args_.q + token(row) * args_.q_stride + head(row) * dim_, dim_ * sizeof(float));
      memcpy(grad_out_ + row * dim_, args_.grad_out + at, dim_ * sizeof(float));
      Vec delta;
      for_each_vec(dim_, [&](int64_t c, int64_t lanes) {
        delta = fma(Vec::load(args_.grad_out + at + c, lanes), Vec::load(args_.out + at + c, lanes), delta);
      });
      delta_[row] = reduce_add(delta);
      lse_[row] = args_.lse[head(row) * args_.tokens + token(row)];
    }
    memset(grad_q_, 0, rows_ * width_ * sizeof(float));
  }

  // The block's share of all three gradients from the keys [first_key, first_key + 64).
  void add_tile(int64_t first_key) {
    const int64_t count = smaller(kKvTile, tokens_ - first_key);
    const int64_t at = (first_token_ + first_key) * args_.kv_stride + kv_head_ * dim_;
    const float* k = args_.k + at;
    pack_transposed(k, args_.kv_stride, count, dim_, keys_, kKvTile, kKvTile);
    pack_transposed(args_.v + at, args_.kv_stride, count, dim_, values_, kKvTile, kKvTile);
    const int64_t first_row = larger(0, first_key - first_) * group_;  // earlier rows see no key of this tile
    const int64_t rows = rows_ - first_row;
    const int64_t tile_rows = ceil_div(rows, ceil_div(rows, kPanelRows));
    for (int64_t row = first_row; row < rows_; row += tile_rows) {
      const int64_t n = smaller(tile_rows, rows_ - row);
      const int64_t visible = smaller(count, position(row + n - 1) + 1 - first_key);
      const int64_t cols = ceil_div(visible, kPanelCols) * kPanelCols;  // the transposed tiles are padded
      multiply(n, cols, {q_ + row * dim_, dim_, 1}, keys_, kKvTile, dim_, {p_ + row * kKvTile, kKvTile, false});
      multiply(n, cols, {grad_out_ + row * dim_, dim_, 1}, values_, kKvTile, dim_, {ds_ + row * kKvTile, kKvTile, false});
      for (int64_t r = row; r < row + n; ++r) differentiate(r, first_key, visible);
      multiply(n, dim_, {ds_ + row * kKvTile, kKvTile, 1}, k, args_.kv_stride, visible, {grad_q_ + row * width_, width_, true});
    }
    for (int64_t key = 0; key < count; key += kPanelRows) {
      const int64_t n = smaller(kPanelRows, count - key), from = first_row * kKvTile + key;
      multiply(n, dim_, {ds_ + from, 1, kKvTile}, q_ + first_row * dim_, dim_, rows,
               {grad_k_ + (first_key + key) * width_, width_, true});
      multiply(n, dim_, {p_ + from, 1, kKvTile}, grad_out_ + first_row * dim_, dim_, rows,
               {grad_v_ + (first_key + key) * width_, width_, true});
    }
  }

  // Products of one row, q k in p_ and grad_out v in ds_, to p and ds, both zero for the keys that the row does not see.
  void differentiate(int64_t row, int64_t first_key, int64_t count) {
    float* p = p_ + row * kKvTile;
    float* ds = ds_ + row * kKvTile;
    const int64_t at = position(row) - first_key;
    const auto [low, high] = visible_keys(at, count, args_.window);
    const bool alibi = args_.alibi_slopes != nullptr;
    const float slope = alibi ? args_.alibi_slopes[head(row)] : 0.0f;
    const int64_t end = larger(0, ceil_div(high, Vec::width) * Vec::width);
    for (int64_t key = end; key < kKvTile; key += Vec::width) {
      Vec().store(p + key);
      Vec().store(ds + key);
    }
    for (int64_t key = 0; key < end; key += Vec::width) {
      const Vec::Mask seen = in_range(key, low, high);
      const Vec probability = exp(scaled_scores(p + key, args_.scale, alibi, slope, key - at) - lse_[row]);
      const Vec slope_of_score = probability * (Vec::load(ds + key) - delta_[row]) * args_.scale;
      select(seen, probability, Vec()).store(p + key);
      select(seen, slope_of_score, Vec()).store(ds + key);
    }
  }

  // A whole product out of register tiles; rows fit one.
  void multiply(int64_t rows, int64_t cols, const Factor& a, const float* b, int64_t b_stride, int64_t depth, const Sums& sums) {
    for (int64_t col = 0; col < cols; col += kPanelCols) {
      multiply_panel(rows, smaller(kPanelCols, cols - col), a, b + col, b_stride, depth,
                     {sums.base + col, sums.stride, sums.resume});
    }
  }

  void write(const float* from, float* to) {
    for_each_vec(dim_, [&](int64_t c, int64_t lanes) { Vec::load(from + c, lanes).store(to + c, lanes); });
  }

  const AttentionBackwardArgs& args_;
  const int64_t kv_head_, first_token_, tokens_, dim_;
  const int64_t width_;  // head_dim in whole vectors
  const int64_t group_, block_;
  int64_t first_ = 0, rows_ = 0;           // the query block: its first position, its rows
  float *q_, *grad_out_, *grad_q_;         // [rows, dim], [rows, dim], [rows, width]
  float *p_, *ds_;                         // [rows, 64]
  float *delta_, *lse_;                    // [rows]
  float *keys_, *values_;                  // a tile, transposed: [dim, 64]
  float *grad_k_, *grad_v_;                // [tokens in whole tiles, width]
};

}  // namespace

void attention_backward(const AttentionBackwardArgs& args) {
  parallel_for(args.num_sequences * args.kv_heads, [&](int64_t task) {
    SequenceHead(args, task / args.kv_heads, task % args.kv_heads).run();
  });
}

}  // namespace hybrid::HYBRID_ISA
