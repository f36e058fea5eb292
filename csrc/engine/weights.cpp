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
  // `widened` takes the floats of parameters that are stored as bfloat16 and read as float.
  Resolver(const TensorTable& table, const std::map<std::string, float>& lora_scales,
           std::vector<std::unique_ptr<float[]>>& widened)
      : table_(table), lora_scales_(lora_scales), widened_(widened) {}

  // A matrix, read as it is stored; data is nullptr where it may be missing and is.
  Weight optional_matrix(const std::string& name, const std::vector<int64_t>& shape) {
    const TensorView* view = find(name);
    if (view == nullptr) return {};
    expect(view->shape == shape, name, shape_text(shape), *view);
    return view->data;
  }

  Weight required_matrix(const std::string& name, const std::vector<int64_t>& shape) {
    const Weight matrix = optional_matrix(name, shape);
    if (matrix.data == nullptr) {
      throw std::invalid_argument("bind: missing parameter '" + name + "', expected shape " + shape_text(shape));
    }
    return matrix;
  }

  const float* optional(const std::string& name, const std::vector<int64_t>& shape) {
    return as_floats(optional_matrix(name, shape), shape);
  }

  const float* required(const std::string& name, const std::vector<int64_t>& shape) {
    return as_floats(required_matrix(name, shape), shape);
  }

  const float* as_floats(const Weight& weight, const std::vector<int64_t>& shape) {
    if (weight.type == Weight::Type::kFloat32) return static_cast<const float*>(weight.data);
    const int64_t count = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
    widened_.push_back(std::make_unique<float[]>(count));
    widen(static_cast<const BFloat16*>(weight.data), count, widened_.back().get());
    return widened_.back().get();
  }

  // A position table: its owner chooses how many rows it has.
  TensorView table_of_rows(const std::string& name, int64_t cols) {
    const TensorView* view = find(name);
    const std::string expected = "[positions, " + std::to_string(cols) + "]";
    if (view == nullptr)
      throw std::invalid_argument("bind: missing parameter '" + name + "', expected shape " + expected);
    expect(view->shape.size() == 2 && view->shape[1] == cols, name, expected, *view);
    return *view;
  }

  NormWeights norm(const std::string& name, const DecoderSpec& spec) {
    NormWeights norm;
    norm.weight = required(name + ".weight", {spec.hidden_size});
    if (spec.norm == NormKind::kLayer) norm.bias = optional(name + ".bias", {spec.hidden_size});
    return norm;
  }

  LinearWeights linear(const std::string& name, int64_t N, int64_t K, std::vector<int64_t> splits) {
    LinearWeights linear;
    linear.weight = required_matrix(name + ".weight", {N, K});
    linear.bias = optional(name + ".bias", {N});
    linear.N = N;
    linear.K = K;
    linear.splits = std::move(splits);
    if (table_.count(name + ".lora_a") || table_.count(name + ".lora_b")) low_rank(name, linear);
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
  void low_rank(const std::string& name, LinearWeights& linear) {
    const auto b = table_.find(name + ".lora_b");
    linear.lora_rank = b == table_.end() || b->second.shape.size() != 2 ? 0 : b->second.shape[1];
    linear.lora_b = required(name + ".lora_b", {linear.N, linear.lora_rank});
    // One pair may serve all outputs instead of one a split: then A has the rows of one.
    const auto a = table_.find(name + ".lora_a");
    const bool one_pair = a != table_.end() && !a->second.shape.empty() && a->second.shape[0] == linear.lora_rank;
    if (one_pair) linear.splits = {linear.N};
    linear.lora_a = required(name + ".lora_a", {linear.lora_columns(), linear.K});
    const auto scale = lora_scales_.find(name);
    if (scale == lora_scales_.end()) {
      throw std::invalid_argument("bind: '" + name + "' has low-rank factors but no entry in lora_scales");
    }
    linear.lora_scale = scale->second;
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
  std::vector<std::unique_ptr<float[]>>& widened_;
  std::set<std::string> used_;
};

BlockWeights resolve_block(Resolver& resolver, const DecoderSpec& spec, const std::string& prefix) {
  BlockWeights block;
  block.attn_norm = resolver.norm(prefix + "attn_norm", spec);
  block.qkv = resolver.linear(prefix + "qkv", spec.qkv_size(), spec.hidden_size, spec.qkv_splits());
  if (spec.qk_norm) {
    block.q_norm = resolver.required(prefix + "q_norm.weight", {spec.head_dim});
    block.k_norm = resolver.required(prefix + "k_norm.weight", {spec.head_dim});
  }
  block.attn_out = resolver.linear(prefix + "attn_out", spec.hidden_size, spec.q_size(), {spec.hidden_size});
  block.mlp_norm = resolver.norm(prefix + "mlp_norm", spec);
  block.mlp_in = resolver.linear(prefix + "mlp_in", spec.mlp_in_size(), spec.hidden_size, spec.mlp_in_splits());
  block.mlp_out = resolver.linear(prefix + "mlp_out", spec.hidden_size, spec.intermediate_size, {spec.hidden_size});
  return block;
}

void resolve_positions(Resolver& resolver, const DecoderSpec& spec, ModelWeights& model) {
  switch (spec.positions) {
    case PositionKind::kRotary: {
      const TensorView cos = resolver.table_of_rows("rope_cos", spec.rotary_dim / 2);
      model.rope_cos = resolver.as_floats(cos.data, cos.shape);
      model.rope_sin = resolver.required("rope_sin", cos.shape);
      model.max_length = std::min(model.max_length, cos.shape[0]);
      break;
    }
    case PositionKind::kLearned: {
      const TensorView learned = resolver.table_of_rows("decoder.embed_positions.weight", spec.hidden_size);
      model.embed_positions = resolver.as_floats(learned.data, learned.shape);
      model.max_length = std::min(model.max_length, learned.shape[0] - spec.position_offset);
      break;
    }
    case PositionKind::kAlibi:
      model.alibi_slopes = resolver.required("alibi_slopes", {spec.heads});
      break;
  }
}

Weight resolve_head(Resolver& resolver, const DecoderSpec& spec, const Weight& embed_tokens) {
  const std::vector<int64_t> shape{spec.vocab_size, spec.embed_dim};
  if (!spec.tied_head) return resolver.required_matrix("head.weight", shape);
  const Weight own = resolver.optional_matrix("head.weight", shape);
  if (own.data != nullptr && own.data != embed_tokens.data) {
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

ModelWeights resolve_weights(const DecoderSpec& spec, const TensorTable& table,
                             const std::map<std::string, float>& lora_scales) {
  ModelWeights model;
  Resolver resolver(table, lora_scales, model.widened);
  model.max_length = spec.max_positions;
  model.embed_tokens = resolver.required_matrix("decoder.embed_tokens.weight", {spec.vocab_size, spec.embed_dim});
  resolve_positions(resolver, spec, model);
  if (spec.projects_embedding()) {
    model.project_in = resolver.linear("decoder.project_in", spec.hidden_size, spec.embed_dim, {spec.hidden_size});
    model.project_out = resolver.linear("decoder.project_out", spec.embed_dim, spec.hidden_size, {spec.embed_dim});
  }
  for (int64_t i = 0; i < spec.num_layers; ++i) {
    model.blocks.push_back(resolve_block(resolver, spec, "decoder.blocks." + std::to_string(i) + "."));
  }
  if (spec.final_norm) model.final_norm = resolver.norm("decoder.final_norm", spec);
  model.head = resolve_head(resolver, spec, model.embed_tokens);
  model.max_lora_columns = widest_low_rank(model);
  resolver.refuse_leftovers();
  return model;
}

}  // namespace hybrid
