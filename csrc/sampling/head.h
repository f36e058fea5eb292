// The language-model head without its logits: a tile of the vocabulary at a time is multiplied out, reduced while it is in
// the cache, and forgotten. Of V logits a row keeps three floats for every 64; the few blocks in which a token is chosen
// are multiplied out again, or, for truncated draws, were kept in a cache of at most 16 MiB (64 blocks a row). Every logit is computed by linear(), so
// it has the same bits wherever and whenever.
#pragma once
#include <cstdint>
#include <span>

#include "common/kernel_memory.h"
#include "common/peers.h"
#include "linear/linear.h"
#include "sampling/block_cache.h"
#include "sampling/draw.h"
#include "sampling/sampling.h"

namespace hybrid {

// Row i of x times the transpose of weight are the logits of row i.
struct HeadArgs {
  const float* x;  // [rows, width], row stride ldx
  int64_t ldx;
  Weight weight;  // [vocab, width]
  int64_t rows, vocab, width;
};

// score_row() of every row; scores [rows].
struct HeadScoreArgs {
  HeadArgs head;
  const int64_t* targets;   // [rows]
  const float* thresholds;  // [rows], or nullptr for the whole vocabulary
  float temperature;
};
void score_head(const HeadScoreArgs& args, RowScore* scores);

// Draws tokens from rows of the head, as sample_row() would from their logits.
class HeadSampler {
 public:
  struct Draw {
    int64_t row;  // of x
    uint64_t sample;
    uint32_t position;
  };

  // Ranks with a slice of the vocabulary each: rank r has the blocks [begins[r], begins[r + 1]).
  struct Together {
    Peers& peers;
    const std::vector<int64_t>& begins;
  };

  // Allocates for up to `max_rows` rows; any number of draws from them.
  HeadSampler(int64_t vocab, int64_t max_rows);
  // What draws of that many rows come to hold, without the blocks that are computed again.
  int64_t declared_bytes(const SamplingRule& rule) const;

  void draw(const HeadArgs& head, const SamplingRule& rule, std::span<const Draw> draws, Sampled* sampled);
  // `head` is this rank's slice. The ranks exchange the statistics of their blocks, and the logits of the few in which a
  // draw chooses; the rest each of them computes for itself, from the same bits.
  void draw_together(const HeadArgs& head, const SamplingRule& rule, std::span<const Draw> draws,
                     const Together& together, Sampled* sampled);

 private:
  struct Missing {
    int64_t block, row;
    const float** logits;  // where the address of its logits goes
  };

  BlockStats stats_of(int64_t row);
  template <typename Fetch>
  void choose(const SamplingRule& rule, std::span<const Draw> draws, const Fetch& fetch_missing, Sampled* sampled);
  void reduce(const HeadArgs& head, int64_t first_block, const SamplingRule& rule);
  int64_t find_blocks(std::span<const Draw> draws, int64_t first);
  void fetch_missing(const HeadArgs& head, int64_t first_block);
  void exchange_missing(const Together& together);

  int64_t vocab_;
  int64_t most_missing_;      // blocks computed together, so that flat distributions take longer rather than more memory
  KernelVector<float> stats_;  // [max_rows, 3, row_blocks(vocab)]
  bool keeps_blocks_ = false;
  BlockCache cache_;
  KernelVector<TokenDraw> plans_;
  KernelVector<const float*> blocks_;  // plan after plan: where its blocks' logits are
  KernelVector<int64_t> first_block_;  // plan after plan: its first place in blocks_
  KernelVector<Missing> missing_;
  KernelVector<float> logits_;  // [missing, kRowBlock]
};

}  // namespace hybrid
