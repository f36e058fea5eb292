// Continuous batching over a known queue of prompts: who is prefilled next, who decodes, and which KV blocks they hold.
// Knows lengths and blocks, never tokens or weights, so it is tested without a model.
//
// Life of a prompt: queued -> prefilling (its blocks are allocated, rows go in chunks) -> its n samples draw their
// first token from the one prefill -> waiting (hold the prompt's blocks) -> live (own a batch slot) -> retired.
//
// Blocks: a prompt is admitted only when its own blocks and the worst case of one of its samples are free beyond what
// was promised to others; a sample becomes live only when its worst case is. So a live sample always gets its next
// block, there is no preemption, and every request that fits the pool alone is served eventually.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <vector>

#include "engine/kv_blocks.h"

namespace hybrid {

struct PromptRequest {
  int64_t prompt_length;  // tokens, at least one
  int64_t max_new;        // tokens a sample may grow to, at least one
  int64_t samples;        // n
  double expected_new;    // expected response length: longer ones are admitted first
};

struct LiveSample {
  int64_t sample;    // index into the output: samples of a prompt are consecutive
  int64_t prompt;    // index into the queue
  int64_t kv_len;    // tokens in the cache
  int64_t promised;  // blocks it may still allocate
  std::vector<int32_t> blocks;
};

struct PrefillChunk {
  int64_t prompt;
  int64_t start, rows;  // prompt tokens [start, start + rows)
  const std::vector<int32_t>* blocks;
  bool completes;  // the prompt's last token is among them
};

struct SchedulerLimits {
  int64_t max_batch;         // live samples
  int64_t max_prefill_rows;  // prompt tokens in one pass; longer prompts go in chunks
};

struct BlockHooks {
  std::function<void(int32_t from, int32_t to)> copy;  // a partial block is forked: called before its copy is used
  std::function<void(int32_t block)> freed;
};

class Scheduler {
 public:
  Scheduler(std::vector<PromptRequest> queue, SchedulerLimits limits, KvBlockPool& pool, BlockHooks hooks);

  // The next packed prefill pass; empty when nothing can be admitted before a sample retires.
  std::vector<PrefillChunk> next_prefill();
  // After the pass that completed `prompt`: `survivors` are the samples that need more than their first token.
  void finish_prefill(int64_t prompt, const std::vector<int64_t>& survivors);
  // Gives every live sample room for one more token, and returns them.
  std::vector<LiveSample>& prepare_decode();
  // After the decode pass: one flag a live sample, in their order. Survivors keep their order.
  void finish_decode(const std::vector<bool>& finished);

  bool done() const { return queue_.empty() && prefilling_.empty() && waiting_.empty() && live_.empty(); }
  int64_t live() const { return static_cast<int64_t>(live_.size()); }
  int64_t promised() const { return promised_; }

  // Worst-case blocks with one sample of the prompt running: the least pool that can serve it.
  static int64_t least_blocks(const PromptRequest& request);
  // Enough blocks for any schedule of the queue: a bigger pool changes nothing.
  static int64_t enough_blocks(const std::vector<PromptRequest>& queue, int64_t max_batch);

 private:
  struct Prompt {
    PromptRequest request;
    int64_t prefilled;
    int64_t waiting;  // samples that have not become live
    std::vector<int32_t> blocks;
  };
  struct Waiting {
    int64_t sample, prompt;
  };

  bool can_admit(const Prompt& prompt) const;
  void admit(Prompt& prompt);
  void activate_waiting();
  bool try_activate(const Waiting& waiting);
  std::vector<int32_t> fork_blocks(Prompt& prompt, bool last);
  int64_t unpromised() const { return pool_.available() - promised_; }
  void release(const std::vector<int32_t>& blocks);

  std::vector<Prompt> prompts_;
  std::deque<int64_t> queue_;       // not admitted, in order of admission
  std::deque<int64_t> prefilling_;  // admitted, prompt not complete
  std::deque<Waiting> waiting_;
  std::vector<LiveSample> live_;
  SchedulerLimits limits_;
  KvBlockPool& pool_;
  BlockHooks hooks_;
  int64_t promised_ = 0;       // blocks that admitted prompts and live samples may still allocate
  int64_t expected_live_ = 0;  // samples of the prompts in prefill
};

}  // namespace hybrid
