// Every stateless operator of the kernel library, and nothing else.
// Implementations register themselves at the foot of their own file (TORCH_LIBRARY_IMPL).
// Shapes: T packed tokens, B sequences, H query heads, KH key/value heads, D head size, K/N in/out features, V vocabulary, R rank.
#include <torch/library.h>

TORCH_LIBRARY(hybrid_kernels, m) {
  // linear: y[T,N] = x[T,K] w[N,K]^T (+ bias[N]) (+ scale * low-rank term, one (A,B) pair per output split)
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, float lora_scale, int[] lora_splits)"
      " -> Tensor");
  m.def(  // act(y), or, gated, act(y[:, :N/2]) y[:, N/2:]: with their bits
      "linear_activation(Tensor x, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, float lora_scale, int[] lora_splits,"
      " str kind, bool gated) -> Tensor");
  m.def("matmul(Tensor a, Tensor b) -> Tensor");  // [M,K] [K,N], any strides: the backward's products, sums in order

  // norm: the residual forms return (normalised, x + residual)
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor sum, Tensor rstd)");
  m.def("rms_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor rstd) -> (Tensor grad_x, Tensor grad_weight)");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps)"
      " -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor mean, Tensor rstd)"
      " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");

  // activation: kind is one of relu, silu, gelu_tanh, gelu_erf
  m.def("bias_activation(Tensor x, Tensor? bias, str kind) -> Tensor");
  m.def("bias_activation_backward(Tensor grad_y, Tensor x, Tensor? bias, str kind) -> (Tensor grad_x, Tensor grad_bias)");
  m.def("gated_activation(Tensor gate_up, str kind) -> Tensor");
  m.def("gated_activation_backward(Tensor grad_y, Tensor gate_up, str kind) -> Tensor");

  // attention: packed sequences for training; block tables for generation
  m.def("rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor positions) -> (Tensor q_rot, Tensor k_rot)");
  m.def("kv_append(Tensor k, Tensor v, Tensor(a!) cache, Tensor slots) -> ()");
  m.def(  // both in one
      "rope_append(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor positions, Tensor(a!) cache, Tensor slots)"
      " -> Tensor");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale, Tensor? alibi_slopes, int window)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens,"
      " float scale, Tensor? alibi_slopes, int window) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def(
      "paged_attention(Tensor q, Tensor cache, Tensor block_tables, Tensor kv_lengths, Tensor cu_q, float scale,"
      " Tensor? alibi_slopes, int window) -> (Tensor out, Tensor lse)");

  // lora: merge into fresh or given storage; the in-place pair restores the base bit for bit
  m.def("lora_merge(Tensor weight, Tensor lora_a, Tensor lora_b, float scale, int[] splits) -> Tensor");
  m.def(
      "lora_merge_(Tensor(a!) weight, Tensor lora_a, Tensor lora_b, float scale, int[] splits)"
      " -> (Tensor residual, Tensor escape_index, Tensor escape_value)");
  m.def(
      "lora_unmerge_(Tensor(a!) weight, Tensor lora_a, Tensor lora_b, float scale, int[] splits,"
      " Tensor residual, Tensor escape_index, Tensor escape_value) -> ()");

  // gather: whole parameters, as bytes, out of the flat shards that an all-gather laid side by side; one entry a parameter
  // in each list
  m.def("unshard_(Tensor(a!) out, Tensor shards, int[] columns, int[] parts, int[] starts, int[] sizes, int[] offsets) -> ()");

  // sampling: logits are divided by temperature in sampling and scoring alike. Scores are over the logits that reach
  // a threshold; the one that held comes back, lowered to the target's logit where that is less
  m.def(
      "token_logprobs(Tensor logits, Tensor targets, float temperature, Tensor? thresholds)"
      " -> (Tensor logprob, Tensor entropy, Tensor lse, Tensor threshold)");
  m.def(
      "token_logprobs_backward(Tensor grad_logprob, Tensor grad_entropy, Tensor logits, Tensor targets, Tensor entropy,"
      " Tensor lse, Tensor thresholds, float temperature) -> Tensor");
  m.def(
      "sample(Tensor logits, float temperature, int top_k, float top_p, int seed, Tensor sample_ids, Tensor positions)"
      " -> (Tensor token, Tensor logprob, Tensor entropy, Tensor kept_mass, Tensor threshold, Tensor kept_logprob)");
  // the same from hidden [N,K] and the head's weight [V,K], a tile of the vocabulary at a time; the backward works
  // through chunk_rows rows at once
  m.def(
      "linear_token_logprobs(Tensor hidden, Tensor weight, Tensor targets, float temperature, Tensor? thresholds,"
      " int chunk_rows) -> (Tensor logprob, Tensor entropy, Tensor lse, Tensor threshold)");
  m.def(
      "linear_sample(Tensor hidden, Tensor weight, float temperature, int top_k, float top_p, int seed,"
      " Tensor sample_ids, Tensor positions)"
      " -> (Tensor token, Tensor logprob, Tensor entropy, Tensor kept_mass, Tensor threshold, Tensor kept_logprob)");

  // rlhf: per-token statistics of a batch of responses [B,T]
  m.def("gae(Tensor rewards, Tensor values, Tensor lengths, float gamma, float lam) -> (Tensor advantages, Tensor returns)");
  m.def("masked_moments(Tensor x, Tensor mask) -> Tensor");  // float64 [3]: count, mean, sum of squared deviations
  m.def("masked_whiten(Tensor x, Tensor mask, Tensor moments, bool shift_mean) -> Tensor");
  m.def(
      "ppo_policy_loss(Tensor logprob, Tensor old_logprob, Tensor advantages, Tensor mask, float clip_low,"
      " float clip_high, float dual_clip) -> (Tensor loss_sum, Tensor grad_logprob, Tensor stats)");
  m.def(
      "ppo_value_loss(Tensor values, Tensor old_values, Tensor returns, Tensor mask, float clip)"
      " -> (Tensor loss_sum, Tensor grad_values, Tensor stats)");
}
