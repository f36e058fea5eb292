#include "engine/decode_program.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

#include "common/kernel_memory.h"
#include "common/parallel.h"
#include "common/thread_pool.h"

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
          Forward& forward, Peers* peers)
      : request_(request), queue_(queue), scheduler_(scheduler), forward_(forward), peers_(peers) {
    result_.responses.resize(request.prompts.size() * request.samples_per_prompt);
  }

  GenerateResult run(const std::function<void(const Progress&)>& between_passes) {
    while (!scheduler_.done()) {
      const std::vector<PassItem>& items = scheduler_.next_pass();
      assemble(items);
      run_forward(count(items));
      draw();
      scheduler_.finish_pass(keep(items));
      try {
        between_passes(progress());
      } catch (...) {
        result_.interruption = std::current_exception();
      }
      if (ended_by_anyone()) break;
    }
    result_.counters.preemptions = scheduler_.preemptions();
    return std::move(result_);
  }

 private:
  struct Draw {
    int64_t logit_row, sample;
    int64_t position;  // in the response
  };

  // Ranks that generate together stop together.
  bool ended_by_anyone() {
    const bool mine = result_.interruption != nullptr;
    if (peers_ == nullptr || !peers_->any(mine)) return mine;
    if (!mine) {
      result_.interruption = std::make_exception_ptr(
          PeerLost("another rank ended the rollout that this rank shares with it; look at its output for the cause"));
    }
    return true;
  }

  void assemble(const std::vector<PassItem>& items) {
    pass_.clear();
    draws_.clear();
    const int64_t n = request_.samples_per_prompt;
    for (const PassItem& item : items) {
      tokens_of_rows_.clear();
      for (int64_t place = item.start; place < item.start + item.rows; ++place) {
        tokens_of_rows_.push_back(token_at(item, place));
      }
      auto logit_row = static_cast<int64_t>(pass_.logit_rows.size());
      pass_.add(tokens_of_rows_.data(), item.start, item.rows, *item.blocks, item.draws());
      for (int64_t place = item.first_draw; place < item.start + item.rows; ++place, ++logit_row) {
        const int64_t position = place + 1 - queue_[item.prompt].prompt_length;
        if (item.sample != kWholePrompt) {
          draws_.push_back({logit_row, item.sample, position});
        } else {
          for (int64_t i = 0; i < n; ++i) draws_.push_back({logit_row, item.prompt * n + i, position});
        }
      }
    }
  }

  int64_t token_at(const PassItem& item, int64_t place) const {
    const std::vector<int64_t>& prompt = request_.prompts[item.prompt];
    const auto position = place - static_cast<int64_t>(prompt.size());
    if (position < 0) return prompt[place];
    const std::vector<int64_t>& response = result_.responses[item.sample].tokens;
    return position < std::ssize(response) ? response[position] : request_.drafts[item.sample][position];
  }

  // Returns the share of the pass that is decoding.
  double count(const std::vector<PassItem>& items) {
    GenerateCounters& counters = result_.counters;
    int64_t decoding = 0;
    for (const PassItem& item : items) {
      const int64_t first_rows = item.rows - item.recomputed;
      counters.recomputed_tokens += item.recomputed;
      if (item.sample == kWholePrompt) {
        counters.prefill_tokens += first_rows;
      } else if (first_rows > 0) {
        ++decoding;
        counters.draft_tokens += first_rows - 1;
      }
    }
    counters.decode_tokens += decoding;
    ++counters.passes;
    counters.decode_steps += decoding > 0;
    counters.prefill_passes += decoding < pass_.rows();
    return static_cast<double>(decoding) / static_cast<double>(pass_.rows());
  }

  void run_forward(double decoding_share) {
    double seconds = 0;
    {
      const Timer timer(seconds);
      forward_.run(pass_);
    }
    result_.counters.decode_seconds += seconds * decoding_share;
    result_.counters.prefill_seconds += seconds * (1 - decoding_share);
  }

  // Draws a token for each of draws_, as many rows of the head at a time as there is memory for. A token's random numbers
  // belong to (seed, sample id, place in the response): batch, slot and prompt length do not enter.
  void draw() {
    const Timer timer(result_.counters.sampling_seconds);
    sampled_.resize(draws_.size());
    const auto rows = static_cast<int64_t>(pass_.logit_rows.size());
    size_t begin = 0;
    for (int64_t first = 0; first < rows; first += forward_.max_logit_rows()) {
      const int64_t count = std::min(forward_.max_logit_rows(), rows - first);
      head_draws_.clear();
      for (size_t i = begin; i < draws_.size() && draws_[i].logit_row < first + count; ++i) {
        const Draw& draw = draws_[i];
        head_draws_.push_back(
            {draw.logit_row - first, request_.sample_ids[draw.sample], static_cast<uint32_t>(draw.position)});
      }
      forward_.draw(first, count, request_.rule, head_draws_, sampled_.data() + begin);
      begin += head_draws_.size();
    }
  }

  // Appends what was drawn to the responses: of a draft's rows, up to the first token that is not the draft's, because
  // the rows behind it saw another sequence than the response has become.
  std::vector<Outcome> keep(const std::vector<PassItem>& items) {
    drawn_.clear();
    std::vector<Outcome> outcomes;
    size_t next = 0;
    for (const PassItem& item : items) {
      if (item.sample == kWholePrompt) {
        const int64_t samples = item.draws() > 0 ? request_.samples_per_prompt : 0;
        for (int64_t i = 0; i < samples; ++i) outcomes.push_back(keep(next++, 1));
      } else if (item.draws() > 0) {
        outcomes.push_back(keep(next, item.draws()));
        next += item.draws();
      }
    }
    return outcomes;
  }

  Outcome keep(size_t first, int64_t count) {
    Outcome outcome{0, false, true};
    while (outcome.tokens < count && outcome.on_draft && !outcome.finished) {
      const Draw& draw = draws_[first + outcome.tokens];
      const Sampled& sampled = sampled_[first + outcome.tokens];
      ++outcome.tokens;
      outcome.finished = record(draw.sample, sampled);
      outcome.on_draft = draft_at(draw) == sampled.token;
      result_.counters.draft_accepted += outcome.on_draft;
    }
    return outcome;
  }

  int64_t draft_at(const Draw& draw) const {
    if (request_.drafts.empty()) return -1;
    const std::vector<int64_t>& draft = request_.drafts[draw.sample];
    return draw.position < std::ssize(draft) ? draft[draw.position] : -1;
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
    response.thresholds.push_back(drawn.threshold);
    response.kept_logprobs.push_back(drawn.kept_logprob);
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
  Peers* peers_;
  GenerateResult result_;
  Pass pass_;
  std::vector<int64_t> tokens_of_rows_;
  std::vector<Draw> draws_;
  std::vector<HeadSampler::Draw> head_draws_;
  std::vector<Sampled> sampled_;   // one a draw
  std::vector<DrawnToken> drawn_;  // what was kept of them
  int64_t done_ = 0, tokens_ = 0;
};

void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument("generate: " + message);
}

void require_at_least(int64_t least, int64_t value, const char* name) {
  require(value >= least,
          std::string(name) + " must be at least " + std::to_string(least) + ", got " + std::to_string(value));
}

// Rows of the head at a time: it is near its full rate, and a vocabulary of 50,000 takes 3 MB.
constexpr int64_t kHeadRows = 128;

// The most rows beyond those of decoding samples that one pass can have.
int64_t rows_beyond_decoding(const std::vector<PromptRequest>& queue, bool may_preempt) {
  int64_t rows = 0;
  for (const PromptRequest& prompt : queue) {
    rows += prompt.prompt_length + std::accumulate(prompt.drafts.begin(), prompt.drafts.end(), int64_t{0});
    if (may_preempt) rows += prompt.samples * (prompt.prompt_length + prompt.max_new);
  }
  return rows;
}

}  // namespace

DecodeProgram::DecodeProgram(DecoderSpec spec, Slices slices, std::shared_ptr<Peers> peers)
    : spec_(std::move(spec)), slices_(std::move(slices)), peers_(std::move(peers)) {
  spec_.validate();
  slices_.validate(spec_);
  require((peers_ ? peers_->ranks() : 1) == slices_.ranks(), "there must be slices for every rank of the group");
}

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
  require(request.prompt_max_new.empty() || request.prompt_max_new.size() == request.prompts.size(),
          "prompt_max_new must be empty or have one limit a prompt");
  for (const int64_t limit : request.prompt_max_new) require_at_least(1, limit, "prompt_max_new");
  require(request.drafts.empty() || request.drafts.size() == samples,
          "drafts must be empty or have one list of tokens a sample");
  for (size_t i = 0; i < request.drafts.size(); ++i) require_tokens(request.drafts[i], "draft " + std::to_string(i));
  for (size_t i = 0; i < request.prompts.size(); ++i) {
    const std::string name = "prompt " + std::to_string(i);
    const auto length = static_cast<int64_t>(request.prompts[i].size());
    require(length > 0, name + " is empty");
    require(length < spec_.max_positions, name + " has " + std::to_string(length) +
                                              " tokens, which leaves no room for a response in the context of " +
                                              std::to_string(spec_.max_positions));
    require_tokens(request.prompts[i], name);
  }
}

void DecodeProgram::require_tokens(const std::vector<int64_t>& tokens, const std::string& name) const {
  for (const int64_t token : tokens) {
    require(token >= 0 && token < spec_.vocab_size, name + " has token id " + std::to_string(token) +
                                                        ", outside the vocabulary of " +
                                                        std::to_string(spec_.vocab_size));
  }
}

std::vector<PromptRequest> DecodeProgram::plan(const GenerateRequest& request) const {
  std::vector<PromptRequest> queue;
  for (size_t i = 0; i < request.prompts.size(); ++i) {
    const auto length = static_cast<int64_t>(request.prompts[i].size());
    int64_t max_new = std::min(request.max_new_tokens, spec_.max_positions - length);
    if (!request.prompt_max_new.empty()) max_new = std::min(max_new, request.prompt_max_new[i]);
    require(length + max_new <= weights_->max_length,
            "prompt " + std::to_string(i) + " may reach " + std::to_string(length + max_new) +
                " tokens, but the bound position table has " + std::to_string(weights_->max_length) + " rows");
    const double expected = request.expected_new.empty() ? 0 : request.expected_new[i];
    queue.push_back({length, max_new, request.samples_per_prompt, expected, {}});
    for (int64_t j = 0; j < (request.drafts.empty() ? 0 : request.samples_per_prompt); ++j) {
      const auto draft = std::ssize(request.drafts[i * request.samples_per_prompt + j]);
      queue.back().drafts.push_back(std::min<int64_t>(draft, max_new));
    }
  }
  return queue;
}

int64_t DecodeProgram::block_count(const std::vector<PromptRequest>& queue, const GenerateRequest& request) const {
  const int64_t enough = Scheduler::enough_blocks(queue, request.max_batch);
  if (request.kv_bytes == 0) return enough;
  // Ranks schedule alike, so what fits is what fits the rank with most heads.
  const KvCacheLayout widest{slices_.most_kv_heads(spec_), spec_.head_dim};
  const int64_t block_bytes = KvArena::block_bytes(widest, spec_.num_layers);
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

DecodeProgram::Sizes DecodeProgram::sizes(const std::vector<PromptRequest>& queue,
                                          const GenerateRequest& request) const {
  const int64_t blocks = block_count(queue, request);
  int64_t samples = 0;
  bool drafts = false;
  for (const PromptRequest& prompt : queue) {
    samples += prompt.samples;
    drafts = drafts || !prompt.drafts.empty();
  }
  const int64_t batch = std::min(request.max_batch, samples);
  const bool may_preempt = blocks < Scheduler::enough_blocks(queue, request.max_batch);
  const int64_t prefill_rows = std::min(request.max_prefill_rows, rows_beyond_decoding(queue, may_preempt));
  const int64_t logit_rows = drafts ? std::max(batch, std::min(kHeadRows, prefill_rows)) : batch;
  return {blocks, batch, prefill_rows, logit_rows};
}

DeclaredMemory DecodeProgram::declare(const std::vector<PromptRequest>& queue, const GenerateRequest& request,
                                      int64_t lora_columns) const {
  const auto [blocks, batch, prefill_rows, logit_rows] = sizes(queue, request);
  const KvCacheLayout layout{slices_.kv_heads(spec_), spec_.head_dim};
  KvArena nothing(layout, spec_.num_layers, 0);
  ModelWeights weights;
  weights.max_lora_columns = lora_columns;
  // The real thing, whose memory is hardly touched.
  const Forward forward(spec_, slices_, weights, nullptr, peers_.get(), nothing, prefill_rows + batch, logit_rows);
  return {KvArena::block_bytes(layout, spec_.num_layers), blocks,
          forward.scratch_bytes() + forward.sampler_bytes(request.rule) + (peers_ ? peers_->bytes() : 0)};
}

KvArena& DecodeProgram::take_arena(int64_t blocks) {
  if (arena_ == nullptr || arena_->blocks() < blocks) {
    arena_.reset();  // before the new one: never both
    arena_ = std::make_unique<KvArena>(KvCacheLayout{slices_.kv_heads(spec_), spec_.head_dim}, spec_.num_layers, blocks);
  }
  return *arena_;
}

GenerateResult DecodeProgram::generate(const GenerateRequest& request,
                                       const std::function<void(const Progress&)>& between_passes) {
  try {
    return serve(request, between_passes);
  } catch (...) {
    if (peers_) peers_->leave();  // or they would wait for this rank
    throw;
  }
}

GenerateResult DecodeProgram::serve(const GenerateRequest& request,
                                    const std::function<void(const Progress&)>& between_passes) {
  check(request);
  ++rollouts_;
  const GateVisit visit(gate_.get(), peers_ ? static_cast<int64_t>(peers_->begun_at()) : rollouts_);
  const std::vector<PromptRequest> queue = plan(request);
  const auto [blocks, batch, prefill_rows, logit_rows] = sizes(queue, request);
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
  Scheduler scheduler(queue, {batch, prefill_rows}, pool, hooks);
  Forward forward(spec_, slices_, *weights_, gate_.get(), peers_.get(), arena, prefill_rows + batch, logit_rows);
  const PoolRegion threads;
  GenerateResult result = Rollout(request, queue, scheduler, forward, peers_.get()).run(between_passes);
  result.counters.block_bytes = KvArena::block_bytes(arena.layout(), spec_.num_layers);
  result.counters.arena_blocks = blocks;
  result.counters.peak_blocks = pool.peak_used();
  result.counters.scratch_bytes = forward.scratch_bytes() + kernel_memory_bytes + (peers_ ? peers_->bytes() : 0);
  return result;
}

}  // namespace hybrid
