// Continuous batching over a known queue of prompts: which rows the next pass computes, and which KV blocks they use.
// Knows lengths and blocks, never tokens or weights, so it is tested without a model.
//
// Life of a prompt: queued -> resident while its rows are computed, in chunks -> its n samples draw their first token
// from its last row -> they wait, and the prompt's blocks are held for them -> each becomes resident on a fork of those
// blocks -> retired. A pass holds the next row of every resident sample and, up to a budget, rows of prompts: a refill
// stalls nobody, and prompt rows share the pass's one read of the weights.
//
// Blocks: prompts and samples are admitted on their likely length, so more fit than in the worst case. When the blocks
// run out, held prompts give theirs back first, then the youngest resident is preempted: it waits at the front, and
// later computes its sequence again, from a sibling's copy of the prompt where there is one. The oldest resident is
// never preempted and gets rows in every pass, so whatever fits the pool alone is served.
//
// Drafts: a sample may come with tokens to try. They are rows of its next passes; the caller says how many held, and
// the sample goes on behind them.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <vector>

#include "engine/kv_blocks.h"

namespace hybrid {

struct PromptRequest {
  int64_t prompt_length;        // tokens, at least one
  int64_t max_new;              // tokens a sample may grow to, at least one
  int64_t samples;              // n
  double expected_new = 0;      // expected response length: longer ones are admitted first; 0: not known
  std::vector<int64_t> drafts;  // tokens of each sample's draft, or empty
};

// Places [start, start + rows) of one sequence. The rows from place `first_draw` on, if any, give a next token.
struct PassItem {
  int64_t prompt;      // index into the queue
  int64_t sample;      // index into the output, samples of a prompt consecutive; kWholePrompt: the prompt itself
  int64_t start, rows;
  int64_t first_draw;  // start + rows where nothing is drawn
  int64_t recomputed;  // leading rows that an earlier pass had computed already
  const std::vector<int32_t>* blocks;  // valid until finish_pass
  int64_t draws() const { return start + rows - first_draw; }
};
inline constexpr int64_t kWholePrompt = -1;

// What became of one sample of a pass.
struct Outcome {
  int64_t tokens;  // appended to the response
  bool finished;
  bool on_draft;  // all of them agree with the draft
};

struct SchedulerLimits {
  int64_t max_batch;         // resident samples
  int64_t max_prefill_rows;  // rows of a pass beyond one a sample: prompts (longer ones go in chunks) and drafts
};

struct BlockHooks {
  std::function<void(int32_t from, int32_t to)> copy;  // a partial block is forked: called before its copy is used
  std::function<void(int32_t block)> freed;
};

class Scheduler {
 public:
  Scheduler(std::vector<PromptRequest> queue, SchedulerLimits limits, KvBlockPool& pool, BlockHooks hooks);

  // The rows to compute next. Never empty before done().
  const std::vector<PassItem>& next_pass();
  // Outcomes of that pass's items that draw, in order: one for each sample of a prompt, one for a sample.
  void finish_pass(const std::vector<Outcome>& outcomes);

  bool done() const { return queue_.empty() && waiting_.empty() && residents_.empty(); }
  int64_t slots_taken() const;
  int64_t preemptions() const { return preemptions_; }

  // The least pool that can serve the request.
  static int64_t least_blocks(const PromptRequest& request);
  // Enough blocks for any schedule of the queue without preemption: a bigger pool changes nothing.
  static int64_t enough_blocks(const std::vector<PromptRequest>& queue, int64_t max_batch);

 private:
  struct Prompt {
    PromptRequest request;
    int64_t first_sample;
    int64_t computed = 0;       // rows that some pass has computed
    int64_t waiting = 0;        // samples in waiting_
    std::vector<int32_t> held{};  // blocks of the whole prompt while samples wait for them
  };
  struct Waiting {
    int64_t prompt, sample;
    int64_t known;  // tokens of prompt and response
    int64_t draft;  // tokens to try behind them
  };
  struct Resident {
    int64_t prompt, sample;  // sample kWholePrompt: the prompt itself
    int64_t known, draft;
    int64_t cached;  // tokens in the cache
    int64_t slots;   // of the batch: for a prompt, what its samples can have
    std::vector<int32_t> blocks;
    bool decodes() const { return sample != kWholePrompt && known - cached == 1; }
  };
  using Blocks = std::vector<int32_t>;

  void grow();
  bool allocate_for(Resident& resident, int64_t tokens);
  void make_room();
  bool release_held(int64_t except);
  void preempt_youngest();
  void admit();
  bool admit_prompt();
  bool admit_waiting();
  void fork(Resident& sample, const Blocks& whole_prompt);
  const Blocks* whole_prompt_of(int64_t prompt) const;
  int64_t likely_growth() const;
  int64_t rows_to_compute() const;
  void add_item(Resident& resident, int64_t& budget);
  const Outcome* finish_prompt(Resident& resident, const Outcome* outcomes);
  bool finish_sample(Resident& resident, const Outcome& outcome);
  void release(Blocks& blocks, int64_t keep = 0);

  std::vector<Prompt> prompts_;
  std::deque<int64_t> queue_;        // prompts to be computed
  std::deque<Waiting> waiting_;      // samples with a first token that are not resident; before the queue
  std::vector<Resident> residents_;  // oldest first
  std::vector<PassItem> items_;
  std::vector<size_t> item_residents_;  // whose rows they are
  SchedulerLimits limits_;
  KvBlockPool& pool_;
  BlockHooks hooks_;
  int64_t preemptions_ = 0;
};

}  // namespace hybrid
