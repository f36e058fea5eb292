#include "sampling/head.h"

#include <algorithm>

#include "common/parallel.h"
#include "linear/linear.h"
#include "linear/scratch.h"

namespace hybrid {
namespace {

constexpr int64_t kScoreRows = 256;        // rows that share a reading of the head
constexpr int64_t kTileFloats = 32 * 1024;  // logits of a tile: 128 KiB of an L2
constexpr int64_t kMostTileCols = 1024;    // few rows: enough tiles for the team to share
// Blocks that are computed again together: 2 MiB of logits, or 32 KiB a row.
constexpr int64_t kLeastMissing = 8192, kMissingPerRow = 128;

// logits [rows, cols] of the vocabulary's columns [col, col + cols).
void multiply(const HeadArgs& head, int64_t col, int64_t cols, float* logits, int64_t stride) {
  linear({.x = head.x, .ldx = head.ldx, .w = head.weight.from(col * head.width), .ldw = head.width, .y = logits,
          .ldy = stride, .M = head.rows, .N = cols, .K = head.width});
}

int64_t tile_cols(int64_t rows) {
  const int64_t fitting = kTileFloats / std::max<int64_t>(rows, 1) / kRowBlock * kRowBlock;
  return std::clamp(fitting, kRowBlock, kMostTileCols);
}

// Calls reduce(row, first column, columns, logits) for every row of every tile.
template <typename Reduce>
void for_each_tile(const HeadArgs& head, const Reduce& reduce) {
  const int64_t width = tile_cols(head.rows);
  linear_tiles({.x = head.x, .ldx = head.ldx, .w = head.weight, .M = head.rows, .N = head.vocab, .K = head.width,
                .tile_cols = width},
               [&](int64_t first, int64_t rows, int64_t col, int64_t cols, const float* logits) {
                 for (int64_t row = 0; row < rows; ++row) reduce(first + row, col, cols, logits + row * width);
               });
}

}  // namespace

void score_head(const HeadScoreArgs& args, RowScore* scores) {
  const int64_t vocab = args.head.vocab, blocks = row_blocks(vocab);
  const int64_t most = std::min(args.head.rows, kScoreRows);
  std::vector<float> stats(3 * most * blocks), target_logits(most), least(most);
  const auto stats_of = [&](int64_t row) {
    float* base = stats.data() + 3 * row * blocks;
    return BlockStats{base, base + blocks, base + 2 * blocks};
  };
  for (int64_t first = 0; first < args.head.rows; first += kScoreRows) {
    HeadArgs chunk = args.head;
    chunk.x += first * chunk.ldx;
    chunk.rows = std::min(kScoreRows, args.head.rows - first);
    const int64_t* targets = args.targets + first;
    // A target's own logit first: it may lower the threshold.
    parallel_for(chunk.rows, [&](int64_t row) {
      HeadArgs one = chunk;
      one.x += row * one.ldx;
      one.rows = 1;
      multiply(one, targets[row], 1, &target_logits[row], 1);
      const float threshold = args.thresholds != nullptr ? args.thresholds[first + row] : kKeepAll;
      least[row] = target_logits[row] < threshold ? target_logits[row] : threshold;
    });
    for_each_tile(chunk, [&](int64_t row, int64_t col, int64_t cols, const float* logits) {
      block_stats(logits, cols, args.temperature, least[row], stats_of(row).from(col / kRowBlock));
    });
    parallel_for(chunk.rows, [&](int64_t row) {
      scores[first + row] = score_from(stats_of(row), vocab, target_logits[row], args.temperature, least[row]);
    });
  }
}

HeadSampler::HeadSampler(int64_t vocab, int64_t max_rows)
    : vocab_(vocab),
      most_missing_(std::max(kLeastMissing, kMissingPerRow * max_rows)),
      stats_(3 * max_rows * row_blocks(vocab)) {}

int64_t HeadSampler::declared_bytes(const SamplingRule& rule) const {
  const int64_t blocks = row_blocks(vocab_), rows = std::ssize(stats_) / (3 * blocks);
  const int64_t stats = std::ssize(stats_) * static_cast<int64_t>(sizeof(float));
  return stats + (truncates(rule, vocab_) ? BlockCache::bytes_for(rows, blocks) : 0);
}

BlockStats HeadSampler::stats_of(int64_t row) {
  const int64_t blocks = row_blocks(vocab_);
  float* base = stats_.data() + 3 * row * blocks;
  return {base, base + blocks, base + 2 * blocks};
}

void HeadSampler::draw(const HeadArgs& head, const SamplingRule& rule, std::span<const Draw> draws, Sampled* sampled) {
  if (draws.empty()) return;
  keeps_blocks_ = truncates(rule, vocab_);
  if (keeps_blocks_) cache_.reset(head.rows, row_blocks(vocab_));
  reduce(head, 0, rule);
  choose(rule, draws, [&] { fetch_missing(head, 0); }, sampled);
}

void HeadSampler::draw_together(const HeadArgs& head, const SamplingRule& rule, std::span<const Draw> draws,
                                const Together& together, Sampled* sampled) {
  if (draws.empty()) return;
  keeps_blocks_ = false;  // each rank would have its own: all blocks are looked up alike
  const int64_t first_block = together.begins[together.peers.rank()], blocks = row_blocks(vocab_);
  reduce(head, first_block, rule);
  together.peers.share_columns(stats_.data() + first_block, blocks, stats_.data(), 3 * head.rows, together.begins);
  const auto fetch = [&] {
    fetch_missing(head, first_block);
    exchange_missing(together);
  };
  choose(rule, draws, fetch, sampled);
}

template <typename Fetch>
void HeadSampler::choose(const SamplingRule& rule, std::span<const Draw> draws, const Fetch& fetch_missing,
                         Sampled* sampled) {
  const auto count = std::ssize(draws);
  if (std::ssize(plans_) < count) plans_.resize(count);
  parallel_for(count, [&](int64_t i) {
    plans_[i].plan(stats_of(draws[i].row), vocab_, rule, {rule.seed, draws[i].sample, draws[i].position});
  });
  for (int64_t first = 0, end = 0; first < count; first = end) {
    end = find_blocks(draws, first);
    fetch_missing();
    parallel_for(end - first, [&](int64_t i) {
      sampled[first + i] = plans_[first + i].finish(blocks_.data() + first_block_[i]);
    });
  }
}

// Statistics of all rows' blocks from `first_block` on, and for truncated draws their highest blocks.
void HeadSampler::reduce(const HeadArgs& head, int64_t first_block, const SamplingRule& rule) {
  for_each_tile(head, [&](int64_t row, int64_t col, int64_t cols, const float* logits) {
    const int64_t first = first_block + col / kRowBlock;
    const BlockStats stats = stats_of(row);
    block_stats(logits, cols, effective_temperature(rule), kKeepAll, stats.from(first));
    if (!keeps_blocks_) return;
    for (int64_t b = first; b * kRowBlock < col + cols; ++b) {
      cache_.offer(row, b, stats.max[b], logits + (b - first) * kRowBlock, block_size(b, vocab_));
    }
  });
}

// Looks up the blocks of the draws from `first` on, until there are enough missing ones. Returns where it stopped.
int64_t HeadSampler::find_blocks(std::span<const Draw> draws, int64_t first) {
  blocks_.clear();
  first_block_.clear();
  missing_.clear();
  const auto whole = std::ssize(draws) - first;
  size_t most = 0;
  for (int64_t i = first; i < first + whole; ++i) most += plans_[i].blocks().size();
  blocks_.reserve(most);  // its addresses are handed out
  int64_t i = first;
  for (; i < std::ssize(draws) && std::ssize(missing_) < most_missing_; ++i) {
    first_block_.push_back(std::ssize(blocks_));
    for (const int32_t block : plans_[i].blocks()) {
      const float* cached = keeps_blocks_ ? cache_.find(draws[i].row, block) : nullptr;
      blocks_.push_back(cached);
      if (cached == nullptr) missing_.push_back({block, draws[i].row, &blocks_.back()});
    }
  }
  return i;
}

// Multiplies out the missing blocks that lie in `head`, which begins with `first_block`: each is read once for all the rows
// that ask for it.
void HeadSampler::fetch_missing(const HeadArgs& head, int64_t first_block) {
  std::ranges::sort(missing_, {}, &Missing::block);
  float* logits = room_for(logits_, missing_.size() * kRowBlock).data();
  KernelVector<int64_t> begins;  // of each block's rows
  for (int64_t i = 0; i < std::ssize(missing_); ++i) {
    if (i == 0 || missing_[i].block != missing_[i - 1].block) begins.push_back(i);
    *missing_[i].logits = logits + i * kRowBlock;
  }
  begins.push_back(std::ssize(missing_));
  parallel_for(std::ssize(begins) - 1, [&](int64_t part) {
    const int64_t begin = begins[part], block = missing_[begin].block, col = (block - first_block) * kRowBlock;
    if (col < 0 || col >= head.vocab) return;
    HeadArgs rows = head;
    rows.rows = begins[part + 1] - begin;
    float* x = thread_scratch(ScratchSlot::kHead, rows.rows * head.width);
    for (int64_t i = 0; i < rows.rows; ++i) {
      std::copy_n(head.x + missing_[begin + i].row * head.ldx, head.width, x + i * head.width);
    }
    rows.x = x;
    rows.ldx = head.width;
    multiply(rows, col, block_size(block, vocab_), logits + begin * kRowBlock, kRowBlock);
  });
}

// They lie in the order of the vocabulary, each computed by the rank whose slice it is in.
void HeadSampler::exchange_missing(const Together& together) {
  std::vector<int32_t> owners;
  for (const Missing& missing : missing_) {
    const auto owner = std::ranges::upper_bound(together.begins, missing.block) - together.begins.begin() - 1;
    owners.push_back(static_cast<int32_t>(owner));
  }
  together.peers.share_rows(logits_.data(), kRowBlock, owners);
}

}  // namespace hybrid
