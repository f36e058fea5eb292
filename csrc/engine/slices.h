// What part of a decoder each rank of a tensor-parallel group computes.
//
// Every linear layer is cut by its outputs, the rows of its weight: each output is then one whole sum, in the order that a
// single rank would take, so all results have the same bits whatever the number of ranks. Row ranges also lie contiguously
// in the training storage. The price is an exchange after each of the four instead of after two of them.
#pragma once
#include <cstdint>
#include <vector>

#include "engine/spec.h"

namespace hybrid {

// Query heads that share their key-value heads evenly; counted from the rank's first ones.
struct HeadSegment {
  int64_t first, heads, first_kv, kv_heads;
};

struct Slices {
  int64_t rank = 0;
  // [ranks + 1], ascending from 0: rank r has [begins[r], begins[r + 1]) of the query heads, of the MLP's inner
  // features, of the hidden and embedding features (as outputs), and of the vocabulary, from multiples of 64.
  std::vector<int64_t> heads, intermediate, hidden, embed, vocab;

  static Slices whole(const DecoderSpec& spec);
  void validate(const DecoderSpec& spec) const;  // throws std::invalid_argument

  int64_t ranks() const { return static_cast<int64_t>(heads.size()) - 1; }
  int64_t own(const std::vector<int64_t>& begins) const { return begins[rank + 1] - begins[rank]; }
  // Key-value heads that a rank's query heads look at: ranks may share one.
  int64_t first_kv_head(const DecoderSpec& spec) const;
  int64_t kv_heads(const DecoderSpec& spec) const { return kv_heads_of(spec, rank); }
  int64_t most_kv_heads(const DecoderSpec& spec) const;  // of any rank
  std::vector<HeadSegment> head_segments(const DecoderSpec& spec) const;
  // Outputs of this rank's q|k|v and gate|up: one low-rank pair belongs to each.
  std::vector<int64_t> qkv_splits(const DecoderSpec& spec) const;
  std::vector<int64_t> mlp_in_splits(const DecoderSpec& spec) const;
  std::vector<int64_t> scaled(const std::vector<int64_t>& begins, int64_t factor) const;

 private:
  int64_t kv_heads_of(const DecoderSpec& spec, int64_t rank) const;
};

}  // namespace hybrid
