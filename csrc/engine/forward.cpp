#include "engine/forward.h"

#include <algorithm>
#include <utility>

#include "attention/attention.h"
#include "common/parallel.h"
#include "linear/linear.h"
#include "norm/norm.h"

namespace hybrid {

void Pass::clear() {
  tokens.clear();
  positions.clear();
  sequences.clear();
  logit_rows.clear();
}

void Pass::add(const int64_t* ids, int64_t start, int64_t rows, const std::vector<int32_t>& blocks, int64_t logits) {
  for (int64_t position = start; position < start + rows; ++position) {
    tokens.push_back(ids[position - start]);
    positions.push_back(static_cast<int32_t>(position));
  }
  sequences.push_back({rows, start + rows, &blocks});
  for (int64_t row = this->rows() - logits; row < this->rows(); ++row) logit_rows.push_back(row);
}

namespace {

// Columns, or rows of weights, that no rank's slice is wider than.
int64_t widest_part(const Slices& slices) { return std::max(slices.own(slices.hidden), slices.own(slices.embed)); }

std::vector<int64_t> blocks_of(std::vector<int64_t> vocab) {
  for (int64_t& begin : vocab) begin = row_blocks(begin);
  return vocab;
}

}  // namespace

Forward::Forward(const DecoderSpec& spec, const Slices& slices, const ModelWeights& weights, WeightGate* gate,
                 Peers* peers, KvArena& cache, int64_t max_rows, int64_t max_logit_rows)
    : spec_(spec),
      slices_(slices),
      weights_(weights),
      gate_(gate),
      peers_(peers),
      cache_(cache),
      segments_(slices.head_segments(spec)),
      attended_begins_(slices.scaled(slices.heads, spec.head_dim)),
      block_begins_(blocks_of(slices.vocab)),
      heads_(slices.own(slices.heads)),
      kv_heads_(slices.kv_heads(spec)),
      q_size_(heads_ * spec.head_dim),
      kv_size_(kv_heads_ * spec.head_dim),
      qkv_size_(q_size_ + 2 * kv_size_),
      inner_(slices.own(slices.intermediate)),
      hidden_(max_rows * spec.hidden_size),
      delta_(max_rows * spec.hidden_size),
      normed_(max_rows * spec.hidden_size),
      embedded_(spec.projects_embedding() ? max_rows * spec.embed_dim : 0),
      qkv_(max_rows * qkv_size_),
      attended_(max_rows * q_size_),
      mlp_in_(max_rows * (spec.gated_mlp ? 2 : 1) * inner_),
      activated_(spec.gated_mlp ? max_rows * inner_ : 0),
      low_rank_(max_rows * weights.max_lora_columns),
      part_(peers == nullptr ? 0 : max_rows * widest_part(slices)),
      whole_(peers == nullptr ? 0 : max_rows * std::max(spec.q_size(), spec.intermediate_size)),
      widened_(weights.widenings.size()),
      sampler_(spec.vocab_size, max_logit_rows),
      max_logit_rows_(max_logit_rows) {}

int64_t Forward::scratch_bytes() const {
  int64_t bytes = 0;
  for (const FloatBuffer* buffer : {&hidden_, &delta_, &normed_, &embedded_, &qkv_, &attended_, &mlp_in_, &activated_,
                                    &low_rank_, &part_, &whole_}) {
    bytes += buffer->bytes();
  }
  return bytes;
}

void Forward::run(const Pass& pass) {
  find_slots(pass);
  await(0);
  embed(pass);
  for (int64_t layer = 0; layer < spec_.num_layers; ++layer) {
    await(layer + 1);
    if (spec_.post_norm) {
      block_post_norm(pass, layer);
    } else {
      block_pre_norm(pass, layer);
    }
    if (gate_ != nullptr) gate_->release(layer + 1);
  }
  gather(pass.logit_rows);
}

void Forward::await(int64_t part) {
  if (gate_ != nullptr) gate_->wait(part);
  const bool comes_anew = gate_ != nullptr && gate_->is_streamed(part);
  if (widened_[part] && !comes_anew) return;
  for (const Widening& widening : weights_.widenings[part]) widening.run();
  widened_[part] = true;
}

void Forward::find_slots(const Pass& pass) {
  slots_.clear();
  for (const Pass::Sequence& sequence : pass.sequences) {
    for (int64_t place = sequence.kv_len - sequence.rows; place < sequence.kv_len; ++place) {
      slots_.push_back(cache_.kernel_block((*sequence.blocks)[place / kKvTile]) * kKvTile + place % kKvTile);
    }
  }
}

namespace {

void copy_row(const Weight& table, int64_t row, int64_t width, float* to) {
  if (table.type == Weight::Type::kFloat32) {
    std::copy_n(static_cast<const float*>(table.data) + row * width, width, to);
  } else {
    widen(static_cast<const BFloat16*>(table.data) + row * width, width, to);
  }
}

}  // namespace

void Forward::embed(const Pass& pass) {
  const int64_t width = spec_.embed_dim, first = slices_.vocab[slices_.rank];
  float* target = spec_.projects_embedding() ? embedded_.data() : hidden_.data();
  owners_.clear();
  for (int64_t row = 0; row < pass.rows(); ++row) {
    const auto owner = std::ranges::upper_bound(slices_.vocab, pass.tokens[row]) - slices_.vocab.begin() - 1;
    owners_.push_back(static_cast<int32_t>(owner));
    if (owner == slices_.rank) copy_row(weights_.embed_tokens, pass.tokens[row] - first, width, target + row * width);
  }
  if (peers_ != nullptr) peers_->share_rows(target, width, owners_);
  if (spec_.projects_embedding()) {
    whole_layer(weights_.project_in, slices_.hidden, embedded_.data(), pass.rows(), hidden_.data());
  }
  if (weights_.embed_positions == nullptr) return;
  const int64_t hidden = spec_.hidden_size;
  for (int64_t row = 0; row < pass.rows(); ++row) {
    const float* position = weights_.embed_positions + (pass.positions[row] + spec_.position_offset) * hidden;
    float* out = hidden_.data() + row * hidden;
    for (int64_t i = 0; i < hidden; ++i) out[i] += position[i];
  }
}

void Forward::block_pre_norm(const Pass& pass, int64_t layer) {
  const BlockWeights& block = weights_.blocks[layer];
  if (layer == 0) {
    norm(block.attn_norm, hidden_.data(), nullptr, normed_.data(), pass.rows());
  } else {
    norm(block.attn_norm, delta_.data(), hidden_.data(), normed_.data(), pass.rows());
  }
  attention(pass, layer, normed_.data());
  norm(block.mlp_norm, delta_.data(), hidden_.data(), normed_.data(), pass.rows());
  mlp(block, normed_.data(), pass.rows());
}

void Forward::block_post_norm(const Pass& pass, int64_t layer) {
  const BlockWeights& block = weights_.blocks[layer];
  attention(pass, layer, hidden_.data());
  norm(block.attn_norm, delta_.data(), hidden_.data(), normed_.data(), pass.rows());
  std::swap(hidden_, normed_);
  mlp(block, hidden_.data(), pass.rows());
  norm(block.mlp_norm, delta_.data(), hidden_.data(), normed_.data(), pass.rows());
  std::swap(hidden_, normed_);
}

void Forward::attention(const Pass& pass, int64_t layer, const float* x) {
  const BlockWeights& block = weights_.blocks[layer];
  linear_layer(block.qkv, x, pass.rows(), qkv_.data());
  if (spec_.qk_norm) normalize_heads(block, pass.rows());
  append(pass, cache_.layer(layer));
  attend(pass, layer);
  const float* attended = everyones(attended_.data(), attended_begins_, pass.rows());
  whole_layer(block.attn_out, slices_.hidden, attended, pass.rows(), delta_.data());
}

void Forward::normalize_heads(const BlockWeights& block, int64_t rows) {
  float* copy = attended_.data();  // free until attend() writes it; the kernel's output may not alias its input
  parallel_for(rows, [&](int64_t row) {
    float* heads = qkv_.data() + row * qkv_size_;
    float* from = copy + row * q_size_;
    const auto normalize = [&](float* to, const float* weight, int64_t count) {
      std::copy_n(to, count * spec_.head_dim, from);
      rms_norm({from, nullptr, nullptr, weight, nullptr, to, nullptr, nullptr, count, spec_.head_dim, spec_.norm_eps});
    };
    normalize(heads, block.q_norm, heads_);
    normalize(heads + q_size_, block.k_norm, kv_heads_);
  });
}

// Keys and values go to the cache; with a rotary embedding the queries, where they lie, and the keys turn first.
void Forward::append(const Pass& pass, float* cache) {
  const float* keys = qkv_.data() + q_size_;
  const float* values = keys + kv_size_;
  if (spec_.positions != PositionKind::kRotary) {
    kv_append(keys, values, qkv_size_, pass.rows(), slots_.data(), cache_.layout(), cache);
    return;
  }
  rope_append({.query = {.in = qkv_.data(),
                         .out = qkv_.data(),
                         .in_stride = qkv_size_,
                         .out_stride = qkv_size_,
                         .rows = pass.rows(),
                         .heads = heads_,
                         .head_dim = spec_.head_dim,
                         .rotary_dim = spec_.rotary_dim,
                         .cos = weights_.rope_cos,
                         .sin = weights_.rope_sin,
                         .positions = pass.positions.data()},
               .k = keys,
               .v = values,
               .k_stride = qkv_size_,
               .v_stride = qkv_size_,
               .slots = slots_.data(),
               .layout = cache_.layout(),
               .cache = cache});
}

void Forward::attend(const Pass& pass, int64_t layer) {
  for (const HeadSegment& segment : segments_) attend(pass, layer, segment);
}

void Forward::attend(const Pass& pass, int64_t layer, const HeadSegment& segment) {
  const KvCacheLayout& layout = cache_.layout();
  const float* const cache = cache_.layer(layer) + segment.first_kv * layout.head_stride();
  const float* const queries = qkv_.data() + segment.first * spec_.head_dim;
  float* const out = attended_.data() + segment.first * spec_.head_dim;
  size_t tiles = 0;
  for (const Pass::Sequence& sequence : pass.sequences) tiles += blocks_for(sequence.kv_len);
  std::vector<const float*> keys(tiles), values(tiles);
  std::vector<AttentionSequence> sequences;
  int64_t row = 0;
  size_t tile = 0;
  for (const Pass::Sequence& sequence : pass.sequences) {
    const KvTiles kv{keys.data() + tile, values.data() + tile, layout.head_stride(), layout.head_dim};
    for (int64_t i = 0; i < blocks_for(sequence.kv_len); ++i, ++tile) {
      keys[tile] = cache + cache_.kernel_block((*sequence.blocks)[i]) * layout.block_stride();
      values[tile] = keys[tile] + layout.v_offset();
    }
    sequences.push_back(
        {queries + row * qkv_size_, out + row * q_size_, nullptr, sequence.rows, sequence.kv_len, kv});
    row += sequence.rows;
  }
  AttentionArgs args{};
  args.sequences = sequences.data();
  args.num_sequences = static_cast<int64_t>(sequences.size());
  args.heads = segment.heads;
  args.kv_heads = segment.kv_heads;
  args.head_dim = spec_.head_dim;
  args.q_stride = qkv_size_;
  args.out_stride = q_size_;
  args.scale = spec_.attention_scale;
  if (weights_.alibi_slopes != nullptr) {
    args.alibi_slopes = weights_.alibi_slopes + slices_.heads[slices_.rank] + segment.first;
  }
  args.window = spec_.sliding_window;
  attention_forward(args);
}

void Forward::mlp(const BlockWeights& block, const float* x, int64_t rows) {
  linear_layer(block.mlp_in, x, rows, mlp_in_.data());
  const float* activated = mlp_in_.data();
  if (spec_.gated_mlp) {
    gated_activation(mlp_in_.data(), activated_.data(), rows, inner_, spec_.activation);
    activated = activated_.data();
  } else {
    bias_activation(mlp_in_.data(), nullptr, mlp_in_.data(), rows, inner_, spec_.activation);
  }
  whole_layer(block.mlp_out, slices_.hidden, everyones(activated, slices_.intermediate, rows), rows, delta_.data());
}

// Moves the rows to the front. They ascend, so none is overwritten before it is read.
void Forward::gather(const std::vector<int64_t>& logit_rows) {
  const int64_t width = spec_.hidden_size;
  for (int64_t i = 0; i < static_cast<int64_t>(logit_rows.size()); ++i) {
    if (logit_rows[i] == i) continue;
    std::copy_n(hidden_.data() + logit_rows[i] * width, width, hidden_.data() + i * width);
    std::copy_n(delta_.data() + logit_rows[i] * width, width, delta_.data() + i * width);
  }
}

// What the head reads of `count` logit rows: [count, embed_dim].
const float* Forward::finish(int64_t first, int64_t count) {
  await(spec_.num_layers + 1);
  const int64_t width = spec_.hidden_size;
  float *hidden = hidden_.data() + first * width, *delta = delta_.data() + first * width;
  const float* last = hidden;
  if (spec_.final_norm) {
    norm(weights_.final_norm, delta, hidden, normed_.data(), count);
    last = normed_.data();
  } else if (!spec_.post_norm) {
    for (int64_t i = 0; i < count * width; ++i) hidden[i] += delta[i];
  }
  if (spec_.projects_embedding()) {
    whole_layer(weights_.project_out, slices_.embed, last, count, embedded_.data());
    last = embedded_.data();
  }
  return last;
}

void Forward::draw(int64_t first, int64_t count, const SamplingRule& rule, std::span<const HeadSampler::Draw> draws,
                   Sampled* sampled) {
  const HeadArgs head{.x = finish(first, count),
                      .ldx = spec_.embed_dim,
                      .weight = weights_.head,
                      .rows = count,
                      .vocab = slices_.own(slices_.vocab),
                      .width = spec_.embed_dim};
  if (peers_ == nullptr) {
    sampler_.draw(head, rule, draws, sampled);
  } else {
    sampler_.draw_together(head, rule, draws, {*peers_, block_begins_}, sampled);
  }
}

void Forward::linear_layer(const LinearWeights& layer, const float* x, int64_t rows, float* y) {
  int64_t col = 0;
  for (const LinearWeights::Range& range : layer.ranges) {
    linear({.x = x, .ldx = layer.K, .w = range.weight, .ldw = layer.K, .bias = range.bias, .y = y + col, .ldy = layer.N,
            .M = rows, .N = range.rows, .K = layer.K});
    col += range.rows;
  }
  if (layer.lora_a == nullptr) return;
  const int64_t width = layer.lora_columns();
  linear({.x = x, .ldx = layer.K, .w = layer.lora_a, .ldw = layer.K, .y = low_rank_.data(), .ldy = width,
          .M = rows, .N = width, .K = layer.K});
  col = 0;
  for (const LinearWeights::LowRank& part : layer.low_rank) {
    linear({.x = low_rank_.data() + part.pair * layer.lora_rank, .ldx = width, .w = part.b, .ldw = layer.lora_rank,
            .residual = y + col, .ldr = layer.N, .y = y + col, .ldy = layer.N,
            .M = rows, .N = part.rows, .K = layer.lora_rank, .alpha = layer.lora_scale});
    col += part.rows;
  }
}

void Forward::whole_layer(const LinearWeights& layer, const std::vector<int64_t>& begins, const float* x, int64_t rows,
                          float* y) {
  linear_layer(layer, x, rows, peers_ == nullptr ? y : part_.data());
  if (peers_ != nullptr) peers_->share_columns(part_.data(), layer.N, y, rows, begins);
}

const float* Forward::everyones(const float* mine, const std::vector<int64_t>& begins, int64_t rows) {
  if (peers_ == nullptr) return mine;
  peers_->share_columns(mine, slices_.own(begins), whole_.data(), rows, begins);
  return whole_.data();
}

void Forward::norm(const NormWeights& weights, float* x, float* residual, float* y, int64_t rows) {
  const NormArgs args{x,       residual, residual, weights.weight,    weights.bias,  y,
                      nullptr, nullptr,  rows,     spec_.hidden_size, spec_.norm_eps};
  if (spec_.norm == NormKind::kRms) {
    rms_norm(args);
  } else {
    layer_norm(args);
  }
}

}  // namespace hybrid
