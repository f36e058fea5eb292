// Generation from bound weights: queue of prompts in, tokens with their log-probabilities out.
#pragma once
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/forward.h"
#include "engine/kv_blocks.h"
#include "engine/scheduler.h"
#include "engine/slices.h"
#include "engine/spec.h"
#include "engine/weight_gate.h"
#include "engine/weights.h"
#include "sampling/sampling.h"

namespace hybrid {

struct GenerateRequest {
  std::vector<std::vector<int64_t>> prompts;
  SamplingRule rule;
  int64_t samples_per_prompt = 1;
  int64_t max_new_tokens = 64;
  std::vector<int64_t> prompt_max_new;  // one a prompt, or empty: lower limits than max_new_tokens
  std::vector<int64_t> stop_tokens;  // EOS ids and the caller's own; the one that stops is kept in the response
  std::vector<uint64_t> sample_ids;  // one a sample: its random stream
  std::vector<double> expected_new;  // one a prompt, or empty: expected response lengths, longest admitted first
  int64_t max_batch = 64;            // samples decoded together
  // One a sample, or empty: tokens to try. They are rows of a pass like a prompt's, and a sample keeps those that it
  // draws itself, so its response is the one it would have had without.
  std::vector<std::vector<int64_t>> drafts;
  int64_t max_prefill_rows = 512;    // rows of one pass beyond one a sample: prompts and drafts
  int64_t kv_bytes = 0;              // budget of the cache; 0: as much as the queue can use
  bool keep_cache = false;           // keep the cache's memory for the next call
  bool poison_freed_blocks = false;  // debugging: blocks are NaN until written again
};

enum class FinishReason : uint8_t { kUnfinished, kStop, kLength };

struct Response {
  std::vector<int64_t> tokens;
  std::vector<float> logprobs, entropies, kept_mass, thresholds, kept_logprobs;
  FinishReason reason = FinishReason::kUnfinished;
};

struct GenerateCounters {
  int64_t passes = 0;          // all
  int64_t prefill_passes = 0;  // with rows of prompts, of preempted samples or of drafts
  int64_t decode_steps = 0;    // with rows of samples that decode
  // Rows: of prompts, each computed once; computed again after a preemption; of samples that decode; of drafts.
  int64_t prefill_tokens = 0, recomputed_tokens = 0, decode_tokens = 0, draft_tokens = 0;
  int64_t draft_accepted = 0;  // response tokens that a draft had right
  int64_t preemptions = 0;
  // Without the head. A pass with both kinds of rows counts to each by its share of the rows.
  double prefill_seconds = 0, decode_seconds = 0;
  double sampling_seconds = 0;  // the head, and the draws from it
  int64_t block_bytes = 0, arena_blocks = 0, peak_blocks = 0;
  int64_t scratch_bytes = 0;  // activations of a pass, and what kernels keep in all threads
};

// What a rollout takes besides the weights, known before it runs.
struct DeclaredMemory {
  int64_t block_bytes = 0, blocks = 0;  // of the cache, if all of them come to be used
  int64_t scratch_bytes = 0;            // without what kernels keep in all threads
};

struct GenerateResult {
  std::vector<Response> responses;  // samples of a prompt are consecutive
  GenerateCounters counters;
  std::exception_ptr interruption;  // what between_passes threw; responses may then be unfinished
};

struct DrawnToken {
  int64_t sample, token;
};

struct Progress {
  int64_t done, total, tokens;           // finished samples, all samples, tokens generated so far
  const std::vector<DrawnToken>& drawn;  // by the last pass
};

class DecodeProgram {
 public:
  // With peers, this is one rank of a tensor-parallel group: all of them are given the same requests, take the same steps
  // and return the same result, and each computes its slices.
  DecodeProgram(DecoderSpec spec, Slices slices, std::shared_ptr<Peers> peers);

  // With a gate the weights need not be there yet; generate() waits at it for each part.
  void bind(ModelWeights weights, std::shared_ptr<WeightGate> gate) {
    weights_ = std::move(weights);
    gate_ = std::move(gate);
  }
  void unbind() {
    weights_.reset();
    gate_.reset();
  }
  void release_cache() { arena_.reset(); }
  const DecoderSpec& spec() const { return spec_; }
  const Slices& slices() const { return slices_; }

  // Of a rollout of `queue` with the limits of `request`; no weights need to be bound. `lora_columns` is the widest low-rank
  // intermediate (ModelWeights::max_lora_columns).
  DeclaredMemory declare(const std::vector<PromptRequest>& queue, const GenerateRequest& request,
                         int64_t lora_columns) const;

  // `between_passes` runs after every pass; what it throws ends the call, on all ranks of a group after the same pass, and
  // is handed back with what is finished; the other ranks are handed PeerLost.
  // Throws std::invalid_argument for a request that cannot be served, std::domain_error for logits that are not finite.
  GenerateResult generate(const GenerateRequest& request, const std::function<void(const Progress&)>& between_passes);

 private:
  void check(const GenerateRequest& request) const;
  void require_tokens(const std::vector<int64_t>& tokens, const std::string& name) const;
  std::vector<PromptRequest> plan(const GenerateRequest& request) const;
  // How much of everything serve() makes room for.
  struct Sizes {
    int64_t blocks, batch, prefill_rows, logit_rows;
  };
  Sizes sizes(const std::vector<PromptRequest>& queue, const GenerateRequest& request) const;
  int64_t block_count(const std::vector<PromptRequest>& queue, const GenerateRequest& request) const;
  KvArena& take_arena(int64_t blocks);
  GenerateResult serve(const GenerateRequest& request, const std::function<void(const Progress&)>& between_passes);

  DecoderSpec spec_;
  Slices slices_;
  std::shared_ptr<Peers> peers_;
  std::optional<ModelWeights> weights_;
  std::shared_ptr<WeightGate> gate_;
  std::unique_ptr<KvArena> arena_;
  int64_t rollouts_ = 0;
};

}  // namespace hybrid
