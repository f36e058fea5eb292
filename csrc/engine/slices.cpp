#include "engine/slices.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "sampling/row.h"

namespace hybrid {
namespace {

void require(bool ok, const std::string& what) {
  if (!ok) throw std::invalid_argument("DecodeProgram: the slices' " + what);
}

void require_cover(const std::vector<int64_t>& begins, size_t ranks, int64_t size, const std::string& name) {
  require(begins.size() == ranks + 1 && begins.front() == 0 && begins.back() == size && std::ranges::is_sorted(begins),
          name + " must ascend from 0 to " + std::to_string(size) + " with one more entry than ranks");
}

}  // namespace

Slices Slices::whole(const DecoderSpec& spec) {
  return {0, {0, spec.heads}, {0, spec.intermediate_size}, {0, spec.hidden_size}, {0, spec.embed_dim},
          {0, spec.vocab_size}};
}

void Slices::validate(const DecoderSpec& spec) const {
  require(heads.size() >= 2, "heads need a rank");
  const size_t count = heads.size() - 1;
  require_cover(heads, count, spec.heads, "heads");
  require_cover(intermediate, count, spec.intermediate_size, "intermediate");
  require_cover(hidden, count, spec.hidden_size, "hidden");
  require_cover(embed, count, spec.embed_dim, "embed");
  require_cover(vocab, count, spec.vocab_size, "vocab");
  require(rank >= 0 && rank < ranks(), "rank must be one of " + std::to_string(ranks()));
  for (size_t r = 0; r < count; ++r) {
    require(heads[r] < heads[r + 1], "heads leave rank " + std::to_string(r) + " without one");
    const bool aligned = vocab[r] % kRowBlock == 0 || vocab[r] == spec.vocab_size;
    require(aligned, "vocab begins at " + std::to_string(vocab[r]) + "; expected a multiple of 64");
  }
}

int64_t Slices::first_kv_head(const DecoderSpec& spec) const { return heads[rank] / (spec.heads / spec.kv_heads); }

int64_t Slices::kv_heads_of(const DecoderSpec& spec, int64_t of_rank) const {
  const int64_t group = spec.heads / spec.kv_heads;
  return (heads[of_rank + 1] - 1) / group - heads[of_rank] / group + 1;
}

int64_t Slices::most_kv_heads(const DecoderSpec& spec) const {
  int64_t most = 0;
  for (int64_t r = 0; r < ranks(); ++r) most = std::max(most, kv_heads_of(spec, r));
  return most;
}

std::vector<HeadSegment> Slices::head_segments(const DecoderSpec& spec) const {
  const int64_t group = spec.heads / spec.kv_heads, first = heads[rank], first_kv = first_kv_head(spec);
  std::vector<HeadSegment> segments;
  for (int64_t head = first, end; head < heads[rank + 1]; head = end) {
    const int64_t kv = head / group;
    end = std::min(heads[rank + 1], (kv + 1) * group);
    const bool goes_on = !segments.empty() && end - head == group &&
                         segments.back().heads == segments.back().kv_heads * group;
    if (goes_on) {
      segments.back().heads += group;
      ++segments.back().kv_heads;
    } else {
      segments.push_back({head - first, end - head, kv - first_kv, 1});
    }
  }
  return segments;
}

std::vector<int64_t> Slices::qkv_splits(const DecoderSpec& spec) const {
  const int64_t kv = kv_heads(spec) * spec.head_dim;
  return {own(heads) * spec.head_dim, kv, kv};
}

std::vector<int64_t> Slices::mlp_in_splits(const DecoderSpec& spec) const {
  return std::vector<int64_t>(spec.gated_mlp ? 2 : 1, own(intermediate));
}

std::vector<int64_t> Slices::scaled(const std::vector<int64_t>& begins, int64_t factor) const {
  std::vector<int64_t> result;
  for (const int64_t begin : begins) result.push_back(begin * factor);
  return result;
}

}  // namespace hybrid
