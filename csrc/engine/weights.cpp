#include "engine/weights.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <set>
#include <stdexcept>

namespace hybrid {
namespace {

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

class Resolver {
 public:
  Resolver(const TensorTable& table, const std::map<std::string, float>& lora_scales)
      : table_(table), lora_scales_(lora_scales) {}

  // What is resolved from now on; its parameters that are stored as bfloat16 and read as float go to `widenings`.
  void begin_part(std::vector<Widening>& widenings) { widenings_ = &widenings; }

  // A matrix, read as it is stored; nullptr where it may be missing and is.
  const TensorView* optional_matrix(const std::string& name, const std::vector<int64_t>& shape) {
    const TensorView* view = find(name);
    if (view != nullptr) expect(view->shape == shape, name, shape_text(shape), *view);
    return view;
  }

  const TensorView& required_matrix(const std::string& name, const std::vector<int64_t>& shape) {
    const TensorView* matrix = optional_matrix(name, shape);
    if (matrix == nullptr) {
      throw std::invalid_argument("bind: missing parameter '" + name + "', expected shape " + shape_text(shape));
    }
    return *matrix;
  }

  Weight one_piece(const std::string& name, const TensorView& view) {
    if (view.pieces.size() != 1) throw std::invalid_argument("bind: parameter '" + name + "' must lie in one piece");
    return view.pieces[0].data;
  }

  Weight required_weight(const std::string& name, const std::vector<int64_t>& shape) {
    return one_piece(name, required_matrix(name, shape));
  }

  const float* optional(const std::string& name, const std::vector<int64_t>& shape) {
    const TensorView* view = optional_matrix(name, shape);
    return view == nullptr ? nullptr : as_floats(one_piece(name, *view), elements(shape));
  }

  const float* required(const std::string& name, const std::vector<int64_t>& shape) {
    return as_floats(required_weight(name, shape), elements(shape));
  }

  const float* as_floats(const Weight& weight, int64_t count) {
    if (weight.type == Weight::Type::kFloat32) return static_cast<const float*>(weight.data);
    widenings_->push_back({static_cast<const BFloat16*>(weight.data), std::make_unique<float[]>(count), count});
    return widenings_->back().to.get();
  }

  static int64_t elements(const std::vector<int64_t>& shape) {
    return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  }

  // A position table: its owner chooses how many rows it has, which go to `rows`.
  const float* table_of_rows(const std::string& name, int64_t cols, int64_t& rows) {
    const TensorView* view = find(name);
    const std::string expected = "[positions, " + std::to_string(cols) + "]";
    if (view == nullptr)
      throw std::invalid_argument("bind: missing parameter '" + name + "', expected shape " + expected);
    expect(view->shape.size() == 2 && view->shape[1] == cols, name, expected, *view);
    rows = view->shape[0];
    return as_floats(one_piece(name, *view), elements(view->shape));
  }

  NormWeights norm(const std::string& name, const DecoderSpec& spec) {
    NormWeights norm;
    norm.weight = required(name + ".weight", {spec.hidden_size});
    if (spec.norm == NormKind::kLayer) norm.bias = optional(name + ".bias", {spec.hidden_size});
    return norm;
  }

  // `splits`: outputs of each part of a fused layer, of which N are the sum.
  LinearWeights linear(const std::string& name, int64_t K, const std::vector<int64_t>& splits) {
    LinearWeights linear;
    linear.N = std::accumulate(splits.begin(), splits.end(), int64_t{0});
    linear.K = K;
    const TensorView& weight = required_matrix(name + ".weight", {linear.N, K});
    const TensorView* bias = optional_matrix(name + ".bias", {linear.N});
    if (bias != nullptr && bias->pieces.size() != weight.pieces.size()) {
      throw std::invalid_argument("bind: parameter '" + name + ".bias' must lie in as many pieces as the weight");
    }
    for (size_t i = 0; i < weight.pieces.size(); ++i) {
      const int64_t rows = weight.pieces[i].rows;
      linear.ranges.push_back(
          {weight.pieces[i].data, bias == nullptr ? nullptr : as_floats(bias->pieces[i].data, rows), rows});
    }
    if (table_.count(name + ".lora_a") || table_.count(name + ".lora_b")) low_rank(name, linear, splits);
    return linear;
  }

  void refuse_leftovers() const {
    for (const auto& [name, view] : table_) {
      if (!used_.count(name)) {
        throw std::invalid_argument("bind: parameter '" + name + "' " + shape_text(view.shape) +
                                    " belongs to no part of this decoder");
      }
    }
  }

 private:
  void low_rank(const std::string& name, LinearWeights& linear, const std::vector<int64_t>& splits) {
    const auto b = table_.find(name + ".lora_b");
    linear.lora_rank = b == table_.end() || b->second.shape.size() != 2 ? 0 : b->second.shape[1];
    // One pair may serve all outputs instead of one a split: then A has the rows of one.
    const auto a = table_.find(name + ".lora_a");
    const bool one_pair = a != table_.end() && !a->second.shape.empty() && a->second.shape[0] == linear.lora_rank;
    const std::vector<int64_t> outputs = one_pair ? std::vector<int64_t>{linear.N} : splits;
    linear.lora_pairs = static_cast<int64_t>(outputs.size());
    linear.lora_a = required(name + ".lora_a", {linear.lora_columns(), linear.K});
    cut(required_matrix(name + ".lora_b", {linear.N, linear.lora_rank}), outputs, linear);
    const auto scale = lora_scales_.find(name);
    if (scale == lora_scales_.end()) {
      throw std::invalid_argument("bind: '" + name + "' has low-rank factors but no entry in lora_scales");
    }
    linear.lora_scale = scale->second;
  }

  // Rows of B that lie together and belong to one pair.
  void cut(const TensorView& b, const std::vector<int64_t>& outputs, LinearWeights& linear) {
    int64_t pair = 0, left = outputs[0];
    for (const TensorView::Piece& piece : b.pieces) {
      const float* from = as_floats(piece.data, piece.rows * linear.lora_rank);
      for (int64_t row = 0, count; row < piece.rows; row += count, left -= count) {
        while (left == 0) left = outputs[++pair];
        count = std::min(left, piece.rows - row);
        linear.low_rank.push_back({from + row * linear.lora_rank, count, pair});
      }
    }
  }

  const TensorView* find(const std::string& name) {
    const auto found = table_.find(name);
    if (found == table_.end()) return nullptr;
    used_.insert(name);
    return &found->second;
  }

  static void expect(bool ok, const std::string& name, const std::string& expected, const TensorView& got) {
    if (ok) return;
    throw std::invalid_argument("bind: parameter '" + name + "' expected shape " + expected + ", got " +
                                shape_text(got.shape));
  }

  const TensorTable& table_;
  const std::map<std::string, float>& lora_scales_;
  std::vector<Widening>* widenings_ = nullptr;
  std::set<std::string> used_;
};

BlockWeights resolve_block(Resolver& resolver, const DecoderSpec& spec, const Slices& slices,
                           const std::string& prefix) {
  BlockWeights block;
  const std::vector<int64_t> outputs{slices.own(slices.hidden)};
  block.attn_norm = resolver.norm(prefix + "attn_norm", spec);
  block.qkv = resolver.linear(prefix + "qkv", spec.hidden_size, slices.qkv_splits(spec));
  if (spec.qk_norm) {
    block.q_norm = resolver.required(prefix + "q_norm.weight", {spec.head_dim});
    block.k_norm = resolver.required(prefix + "k_norm.weight", {spec.head_dim});
  }
  block.attn_out = resolver.linear(prefix + "attn_out", spec.q_size(), outputs);
  block.mlp_norm = resolver.norm(prefix + "mlp_norm", spec);
  block.mlp_in = resolver.linear(prefix + "mlp_in", spec.hidden_size, slices.mlp_in_splits(spec));
  block.mlp_out = resolver.linear(prefix + "mlp_out", spec.intermediate_size, outputs);
  return block;
}

void resolve_positions(Resolver& resolver, const DecoderSpec& spec, ModelWeights& model) {
  switch (spec.positions) {
    case PositionKind::kRotary: {
      int64_t rows = 0;
      model.rope_cos = resolver.table_of_rows("rope_cos", spec.rotary_dim / 2, rows);
      model.rope_sin = resolver.required("rope_sin", {rows, spec.rotary_dim / 2});
      model.max_length = std::min(model.max_length, rows);
      break;
    }
    case PositionKind::kLearned: {
      int64_t rows = 0;
      model.embed_positions = resolver.table_of_rows("decoder.embed_positions.weight", spec.hidden_size, rows);
      model.max_length = std::min(model.max_length, rows - spec.position_offset);
      break;
    }
    case PositionKind::kAlibi:
      model.alibi_slopes = resolver.required("alibi_slopes", {spec.heads});
      break;
  }
}

Weight resolve_head(Resolver& resolver, const DecoderSpec& spec, int64_t vocab, const Weight& embed_tokens) {
  const std::vector<int64_t> shape{vocab, spec.embed_dim};
  if (!spec.tied_head) return resolver.required_weight("head.weight", shape);
  const TensorView* own = resolver.optional_matrix("head.weight", shape);
  if (own != nullptr && resolver.one_piece("head.weight", *own).data != embed_tokens.data) {
    throw std::invalid_argument(
        "bind: 'head.weight' of a tied decoder must be the storage of decoder.embed_tokens.weight");
  }
  return embed_tokens;
}

int64_t widest_low_rank(const ModelWeights& model) {
  int64_t widest = std::max(model.project_in.lora_columns(), model.project_out.lora_columns());
  for (const BlockWeights& block : model.blocks) {
    for (const LinearWeights* linear : {&block.qkv, &block.attn_out, &block.mlp_in, &block.mlp_out}) {
      widest = std::max(widest, linear->lora_columns());
    }
  }
  return widest;
}

}  // namespace

ModelWeights resolve_weights(const DecoderSpec& spec, const Slices& slices, const TensorTable& table,
                             const std::map<std::string, float>& lora_scales) {
  ModelWeights model;
  model.widenings.resize(spec.num_layers + 2);
  Resolver resolver(table, lora_scales);
  resolver.begin_part(model.widenings.front());
  const int64_t vocab = slices.own(slices.vocab);
  model.max_length = spec.max_positions;
  model.embed_tokens = resolver.required_weight("decoder.embed_tokens.weight", {vocab, spec.embed_dim});
  resolve_positions(resolver, spec, model);
  if (spec.projects_embedding()) {
    model.project_in = resolver.linear("decoder.project_in", spec.embed_dim, {slices.own(slices.hidden)});
  }
  for (int64_t i = 0; i < spec.num_layers; ++i) {
    resolver.begin_part(model.widenings[i + 1]);
    model.blocks.push_back(resolve_block(resolver, spec, slices, "decoder.blocks." + std::to_string(i) + "."));
  }
  resolver.begin_part(model.widenings.back());
  if (spec.projects_embedding()) {
    model.project_out = resolver.linear("decoder.project_out", spec.hidden_size, {slices.own(slices.embed)});
  }
  if (spec.final_norm) model.final_norm = resolver.norm("decoder.final_norm", spec);
  model.head = resolve_head(resolver, spec, vocab, model.embed_tokens);
  model.max_lora_columns = widest_low_rank(model);
  resolver.refuse_leftovers();
  return model;
}

}  // namespace hybrid
