#include "engine/decode_program.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>
#include <string>

#include "common/parallel.h"

namespace hybrid {
namespace {

class Timer {
 public:
  explicit Timer(double& total) : total_(total), start_(std::chrono::steady_clock::now()) {}
  ~Timer() { total_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  double& total_;
  std::chrono::steady_clock::time_point start_;
};

// One call of generate(): the loop over passes, and the responses as they grow.
class Rollout {
 public:
  Rollout(const GenerateRequest& request, const std::vector<PromptRequest>& queue, Scheduler& scheduler,
          Forward& forward)
      : request_(request), queue_(queue), scheduler_(scheduler), forward_(forward) {
    result_.responses.resize(request.prompts.size() * request.samples_per_prompt);
  }

  GenerateResult run(const std::function<void(const Progress&)>& between_passes) {
    while (!scheduler_.done()) {
      for (auto chunks = scheduler_.next_prefill(); !chunks.empty(); chunks = scheduler_.next_prefill()) {
        prefill(chunks);
        between_passes(progress());
      }
      if (scheduler_.done()) break;
      if (scheduler_.live() == 0) throw std::logic_error("DecodeProgram: nothing is live and nothing can be admitted");
      decode();
      between_passes(progress());
    }
    return std::move(result_);
  }

 private:
  struct Draw {
    int64_t logit_row, sample;
  };

  void prefill(const std::vector<PrefillChunk>& chunks) {
    pass_.clear();
    draws_.clear();
    std::vector<int64_t> completed;
    for (const PrefillChunk& chunk : chunks) {
      pass_.add(request_.prompts[chunk.prompt].data() + chunk.start, chunk.start, chunk.rows, *chunk.blocks,
                chunk.completes);
      if (!chunk.completes) continue;
      const int64_t n = request_.samples_per_prompt, row = static_cast<int64_t>(completed.size());
      for (int64_t i = 0; i < n; ++i) draws_.push_back({row, chunk.prompt * n + i});
      completed.push_back(chunk.prompt);
    }
    result_.counters.prefill_tokens += pass_.rows();
    ++result_.counters.prefill_passes;
    const std::vector<bool> finished = draw(run_forward(result_.counters.prefill_seconds));
    size_t next = 0;
    for (const int64_t prompt : completed) {
      std::vector<int64_t> survivors;
      for (int64_t i = 0; i < request_.samples_per_prompt; ++i, ++next) {
        if (!finished[next]) survivors.push_back(draws_[next].sample);
      }
      scheduler_.finish_prefill(prompt, survivors);
    }
  }

  void decode() {
    pass_.clear();
    draws_.clear();
    for (const LiveSample& live : scheduler_.prepare_decode()) {
      draws_.push_back({static_cast<int64_t>(draws_.size()), live.sample});
      pass_.add(&result_.responses[live.sample].tokens.back(), live.kv_len - 1, 1, live.blocks, true);
    }
    ++result_.counters.decode_steps;
    result_.counters.decode_tokens += pass_.rows();
    scheduler_.finish_decode(draw(run_forward(result_.counters.decode_seconds)));
  }

  const float* run_forward(double& seconds) {
    const Timer timer(seconds);
    return forward_.logits(pass_);
  }

  // Draws one token for each of draws_ and says which samples end with it. A token's random number belongs to
  // (seed, sample id, place in the response): batch, slot and prompt length do not enter.
  std::vector<bool> draw(const float* logits) {
    const Timer timer(result_.counters.sampling_seconds);
    const int64_t vocab = forward_.vocab_size();
    std::vector<Sampled> sampled(draws_.size());
    parallel_for(static_cast<int64_t>(draws_.size()), [&](int64_t i) {
      const Draw& draw = draws_[i];
      const auto position = static_cast<uint32_t>(result_.responses[draw.sample].tokens.size());
      sampled[i] =
          sample_row(logits + draw.logit_row * vocab, vocab, request_.rule, request_.sample_ids[draw.sample], position);
    });
    drawn_.clear();
    std::vector<bool> finished(draws_.size());
    for (size_t i = 0; i < draws_.size(); ++i) finished[i] = record(draws_[i].sample, sampled[i]);
    return finished;
  }

  bool record(int64_t sample, const Sampled& drawn) {
    Response& response = result_.responses[sample];
    if (drawn.token < 0) {
      throw std::domain_error("generate: the logits for token " + std::to_string(response.tokens.size()) +
                              " of sample " + std::to_string(sample) +
                              " are no distribution (NaN or infinite): the weights have diverged");
    }
    response.tokens.push_back(drawn.token);
    response.logprobs.push_back(drawn.logprob);
    response.entropies.push_back(drawn.entropy);
    response.kept_mass.push_back(drawn.kept_mass);
    drawn_.push_back({sample, drawn.token});
    ++tokens_;
    const bool stopped =
        std::find(request_.stop_tokens.begin(), request_.stop_tokens.end(), drawn.token) != request_.stop_tokens.end();
    const int64_t limit = queue_[sample / request_.samples_per_prompt].max_new;
    if (!stopped && static_cast<int64_t>(response.tokens.size()) < limit) return false;
    response.reason = stopped ? FinishReason::kStop : FinishReason::kLength;
    ++done_;
    return true;
  }

  Progress progress() const { return {done_, static_cast<int64_t>(result_.responses.size()), tokens_, drawn_}; }

  const GenerateRequest& request_;
  const std::vector<PromptRequest>& queue_;
  Scheduler& scheduler_;
  Forward& forward_;
  GenerateResult result_;
  Pass pass_;
  std::vector<Draw> draws_;
  std::vector<DrawnToken> drawn_;
  int64_t done_ = 0, tokens_ = 0;
};

void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument("generate: " + message);
}

void require_at_least(int64_t least, int64_t value, const char* name) {
  require(value >= least,
          std::string(name) + " must be at least " + std::to_string(least) + ", got " + std::to_string(value));
}

}  // namespace

void DecodeProgram::check(const GenerateRequest& request) const {
  if (!weights_) throw std::logic_error("DecodeProgram::generate: bind() comes first");
  require_at_least(1, request.samples_per_prompt, "samples_per_prompt");
  require_at_least(1, request.max_new_tokens, "max_new_tokens");
  require_at_least(1, request.max_batch, "max_batch");
  require_at_least(1, request.max_prefill_rows, "max_prefill_rows");
  require_at_least(0, request.kv_bytes, "kv_bytes");
  const SamplingRule& rule = request.rule;
  require(rule.temperature == 0 || (rule.temperature >= kMinTemperature && std::isfinite(rule.temperature)),
          "temperature must be 0 or at least 1e-6, got " + std::to_string(rule.temperature));
  require_at_least(0, rule.top_k, "top_k");
  require(rule.top_p > 0 && rule.top_p <= 1, "top_p must be in (0, 1], got " + std::to_string(rule.top_p));
  const size_t samples = request.prompts.size() * request.samples_per_prompt;
  require(request.sample_ids.size() == samples, "expected one sample id a sample (" + std::to_string(samples) +
                                                    "), got " + std::to_string(request.sample_ids.size()));
  require(request.expected_new.empty() || request.expected_new.size() == request.prompts.size(),
          "expected_new must be empty or have one length a prompt");
  for (size_t i = 0; i < request.prompts.size(); ++i) {
    const std::string name = "prompt " + std::to_string(i);
    const auto length = static_cast<int64_t>(request.prompts[i].size());
    require(length > 0, name + " is empty");
    require(length < spec_.max_positions, name + " has " + std::to_string(length) +
                                              " tokens, which leaves no room for a response in the context of " +
                                              std::to_string(spec_.max_positions));
    for (const int64_t token : request.prompts[i]) {
      require(token >= 0 && token < spec_.vocab_size, name + " has token id " + std::to_string(token) +
                                                          ", outside the vocabulary of " +
                                                          std::to_string(spec_.vocab_size));
    }
  }
}

std::vector<PromptRequest> DecodeProgram::plan(const GenerateRequest& request) const {
  std::vector<PromptRequest> queue;
  for (size_t i = 0; i < request.prompts.size(); ++i) {
    const auto length = static_cast<int64_t>(request.prompts[i].size());
    const int64_t max_new = std::min(request.max_new_tokens, spec_.max_positions - length);
    require(length + max_new <= weights_->max_length,
            "prompt " + std::to_string(i) + " may reach " + std::to_string(length + max_new) +
                " tokens, but the bound position table has " + std::to_string(weights_->max_length) + " rows");
    const double expected = request.expected_new.empty() ? 0 : request.expected_new[i];
    queue.push_back({length, max_new, request.samples_per_prompt, expected});
  }
  return queue;
}

int64_t DecodeProgram::block_count(const std::vector<PromptRequest>& queue, const GenerateRequest& request) const {
  const int64_t enough = Scheduler::enough_blocks(queue, request.max_batch);
  if (request.kv_bytes == 0) return enough;
  const int64_t block_bytes = KvArena::block_bytes({spec_.kv_heads, spec_.head_dim}, spec_.num_layers);
  const int64_t affordable = request.kv_bytes / block_bytes;
  for (size_t i = 0; i < queue.size(); ++i) {
    const int64_t least = Scheduler::least_blocks(queue[i]);
    require(least <= affordable, "prompt " + std::to_string(i) + " (" + std::to_string(queue[i].prompt_length) +
                                     " tokens and up to " + std::to_string(queue[i].max_new) +
                                     " new ones) needs a KV cache of " + std::to_string(least * block_bytes) +
                                     " bytes, but kv_bytes is " + std::to_string(request.kv_bytes));
  }
  return std::min(enough, affordable);
}

KvArena& DecodeProgram::take_arena(int64_t blocks) {
  if (arena_ == nullptr || arena_->blocks() < blocks) {
    arena_.reset();  // before the new one: never both
    arena_ = std::make_unique<KvArena>(KvCacheLayout{spec_.kv_heads, spec_.head_dim}, spec_.num_layers, blocks);
  }
  return *arena_;
}

GenerateResult DecodeProgram::generate(const GenerateRequest& request,
                                       const std::function<void(const Progress&)>& between_passes) {
  check(request);
  const std::vector<PromptRequest> queue = plan(request);
  const int64_t blocks = block_count(queue, request);
  struct ArenaGuard {
    DecodeProgram* program;
    bool keep;
    ~ArenaGuard() {
      if (!keep) program->release_cache();
    }
  } guard{this, request.keep_cache};
  KvArena& arena = take_arena(blocks);
  if (request.poison_freed_blocks) {
    for (int64_t block = 0; block < blocks; ++block) arena.poison_block(static_cast<int32_t>(block));
  }
  KvBlockPool pool(blocks);
  const BlockHooks hooks{[&](int32_t from, int32_t to) { arena.copy_block(from, to); },
                         [&](int32_t block) {
                           if (request.poison_freed_blocks) arena.poison_block(block);
                         }};
  int64_t prompt_tokens = 0;
  for (const PromptRequest& prompt : queue) prompt_tokens += prompt.prompt_length;
  const auto samples = static_cast<int64_t>(request.sample_ids.size());
  const int64_t batch = std::min(request.max_batch, samples);
  const int64_t prefill_rows = std::min(request.max_prefill_rows, prompt_tokens);
  Scheduler scheduler(queue, {batch, prefill_rows}, pool, hooks);
  Forward forward(spec_, *weights_, arena, std::max(prefill_rows, batch), batch);
  GenerateResult result = Rollout(request, queue, scheduler, forward).run(between_passes);
  result.counters.block_bytes = KvArena::block_bytes(arena.layout(), spec_.num_layers);
  result.counters.arena_blocks = blocks;
  result.counters.peak_blocks = pool.peak_used();
  result.counters.scratch_bytes = forward.scratch_bytes();
  return result;
}

}  // namespace hybrid
