#include "engine/scheduler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace hybrid {
namespace {

// The last token of a response is never fed back, so it needs no room.
int64_t max_kv(const PromptRequest& request) { return request.prompt_length + request.max_new - 1; }

int64_t shared_blocks(const PromptRequest& request) { return request.prompt_length / kKvTile; }

bool has_partial_block(const PromptRequest& request) { return request.prompt_length % kKvTile != 0; }

// Blocks that one sample can come to hold beyond the prompt's. The last sample to leave the prompt takes over its
// partial block; the others copy it. A sample that ends with its first token holds nothing.
int64_t own_blocks(const PromptRequest& request, bool last) {
  if (request.max_new == 1) return 0;
  const int64_t beyond = blocks_for(max_kv(request)) - shared_blocks(request);
  return last && has_partial_block(request) ? beyond - 1 : beyond;
}

// Blocks that a sample of `known` tokens will likely hold in the end: those of its expected length, and at least room
// for another tile, so that nobody is admitted only to be preempted at once.
int64_t likely_blocks(const PromptRequest& request, int64_t known) {
  const auto expected = static_cast<int64_t>(std::min<double>(std::ceil(request.expected_new), request.max_new));
  const int64_t tokens = std::max(request.prompt_length + expected, known + kKvTile);
  return blocks_for(std::min(max_kv(request), tokens));
}

// Blocks that `count` samples of a prompt will likely take beyond the prompt's own.
int64_t likely_forks(const PromptRequest& request, int64_t count) {
  if (request.max_new == 1) return 0;
  const int64_t each = likely_blocks(request, request.prompt_length) - shared_blocks(request);
  return count * each - (count == request.samples && has_partial_block(request) ? 1 : 0);
}

}  // namespace

int64_t Scheduler::least_blocks(const PromptRequest& request) { return blocks_for(max_kv(request)); }

int64_t Scheduler::enough_blocks(const std::vector<PromptRequest>& queue, int64_t max_batch) {
  int64_t everything = 0, widest_prompt = 0, least = 0;
  std::vector<int64_t> alone;  // a sample's blocks when it shares with nobody
  for (const PromptRequest& request : queue) {
    everything += blocks_for(request.prompt_length) + (request.samples - 1) * own_blocks(request, false) +
                  own_blocks(request, true);
    widest_prompt = std::max(widest_prompt, blocks_for(request.prompt_length));
    least = std::max(least, least_blocks(request));
    alone.insert(alone.end(), std::min(request.samples, max_batch), blocks_for(max_kv(request)));
  }
  const size_t live = std::min<size_t>(alone.size(), static_cast<size_t>(max_batch));
  std::partial_sort(alone.begin(), alone.begin() + live, alone.end(), std::greater<>());
  const int64_t full_batch = std::accumulate(alone.begin(), alone.begin() + live, int64_t{0}) + widest_prompt;
  return std::max(least, std::min(everything, full_batch));
}

Scheduler::Scheduler(std::vector<PromptRequest> queue, SchedulerLimits limits, KvBlockPool& pool, BlockHooks hooks)
    : limits_(limits), pool_(pool), hooks_(std::move(hooks)) {
  int64_t samples = 0;
  for (PromptRequest& request : queue) {
    if (least_blocks(request) > pool.size()) throw std::logic_error("Scheduler: a request exceeds the whole pool");
    queue_.push_back(static_cast<int64_t>(prompts_.size()));
    prompts_.push_back({std::move(request), samples});
    samples += prompts_.back().request.samples;
  }
  std::stable_sort(queue_.begin(), queue_.end(), [this](int64_t a, int64_t b) {
    return prompts_[a].request.expected_new > prompts_[b].request.expected_new;
  });
}

const std::vector<PassItem>& Scheduler::next_pass() {
  grow();
  admit();
  items_.clear();
  item_residents_.clear();
  int64_t budget = limits_.max_prefill_rows;
  for (size_t i = 0; i < residents_.size(); ++i) {
    const size_t items = items_.size();
    add_item(residents_[i], budget);
    if (items_.size() > items) item_residents_.push_back(i);
  }
  if (items_.empty() && !done()) throw std::logic_error("Scheduler::next_pass: nothing can be computed");
  return items_;
}

// Room for every resident's known tokens, oldest first.
void Scheduler::grow() {
  for (size_t i = 0; i < residents_.size(); ++i) {
    while (i < residents_.size() && !allocate_for(residents_[i], residents_[i].known)) make_room();
  }
}

bool Scheduler::allocate_for(Resident& resident, int64_t tokens) {
  const auto wanted = static_cast<size_t>(blocks_for(tokens));
  while (resident.blocks.size() < wanted && pool_.available() > 0) resident.blocks.push_back(pool_.allocate());
  return resident.blocks.size() >= wanted;
}

void Scheduler::make_room() {
  if (!release_held(/*except=*/-1)) preempt_youngest();
}

// Gives up one prompt that is only held for waiting samples: nobody makes progress with it.
bool Scheduler::release_held(int64_t except) {
  for (auto waiting = waiting_.rbegin(); waiting != waiting_.rend(); ++waiting) {
    Prompt& prompt = prompts_[waiting->prompt];
    if (waiting->prompt == except || prompt.held.empty()) continue;
    release(prompt.held);
    return true;
  }
  return false;
}

void Scheduler::preempt_youngest() {
  Resident& youngest = residents_.back();
  release(youngest.blocks);
  if (youngest.sample == kWholePrompt) {
    queue_.push_front(youngest.prompt);
  } else {
    waiting_.push_front({youngest.prompt, youngest.sample, youngest.known, youngest.draft});
    ++prompts_[youngest.prompt].waiting;
  }
  residents_.pop_back();
  ++preemptions_;
}

void Scheduler::admit() {
  while (slots_taken() < limits_.max_batch) {
    // Waiting samples go first: they hold memory, or have lost work already.
    if (!waiting_.empty()) {
      if (!admit_waiting()) return;
    } else if (queue_.empty() || rows_to_compute() >= limits_.max_prefill_rows || !admit_prompt()) {
      return;
    }
  }
}

bool Scheduler::admit_prompt() {
  const int64_t index = queue_.front();
  const PromptRequest& request = prompts_[index].request;
  const int64_t whole = blocks_for(request.prompt_length);
  const int64_t slots = std::min(request.samples, limits_.max_batch - slots_taken());
  const int64_t likely = whole + likely_forks(request, slots);
  if (!residents_.empty() && likely + likely_growth() > pool_.available()) return false;
  Resident prompt{index, kWholePrompt, request.prompt_length, 0, 0, slots, {}};
  if (!allocate_for(prompt, prompt.known)) throw std::logic_error("Scheduler: an empty batch leaves too few blocks");
  residents_.push_back(std::move(prompt));
  queue_.pop_front();
  return true;
}

bool Scheduler::admit_waiting() {
  const Waiting waiting = waiting_.front();
  Prompt& prompt = prompts_[waiting.prompt];
  const Blocks* whole_prompt = whole_prompt_of(waiting.prompt);
  bool takes_over = prompt.waiting == 1 && !prompt.held.empty();
  const auto inherited = [&] {
    return takes_over ? static_cast<int64_t>(prompt.held.size()) : whole_prompt ? shared_blocks(prompt.request) : 0;
  };
  if (residents_.empty()) {
    // Nobody will free a block, so the sample must start: on what others hold if need be.
    const auto fits = [&] { return blocks_for(waiting.known) - inherited() <= pool_.available(); };
    while (!fits() && release_held(/*except=*/waiting.prompt)) continue;
    if (!fits()) takes_over = true;
  } else if (likely_blocks(prompt.request, waiting.known) - inherited() + likely_growth() > pool_.available()) {
    return false;
  }
  Resident sample{waiting.prompt, waiting.sample, waiting.known, waiting.draft, 0, 1, {}};
  if (whole_prompt != nullptr) sample.cached = prompt.request.prompt_length;
  if (takes_over) {
    sample.blocks = std::exchange(prompt.held, {});
  } else if (whole_prompt != nullptr) {
    fork(sample, *whole_prompt);
  }
  if (!allocate_for(sample, sample.known)) throw std::logic_error("Scheduler: an admitted sample lacks blocks");
  residents_.push_back(std::move(sample));
  waiting_.pop_front();
  --prompt.waiting;
  return true;
}

// The blocks of a prompt that is in the cache as a whole: held for its samples, or under one of them.
const Scheduler::Blocks* Scheduler::whole_prompt_of(int64_t prompt) const {
  if (!prompts_[prompt].held.empty()) return &prompts_[prompt].held;
  for (const Resident& resident : residents_) {
    const bool sibling = resident.prompt == prompt && resident.sample != kWholePrompt;
    if (sibling && resident.cached >= prompts_[prompt].request.prompt_length) return &resident.blocks;
  }
  return nullptr;
}

void Scheduler::fork(Resident& sample, const Blocks& whole_prompt) {
  const PromptRequest& request = prompts_[sample.prompt].request;
  sample.blocks.assign(whole_prompt.begin(), whole_prompt.begin() + shared_blocks(request));
  for (const int32_t block : sample.blocks) pool_.retain(block);
  if (has_partial_block(request)) {
    // Copied now, not at its first write: that write is the sample's very next row.
    sample.blocks.push_back(pool_.allocate());
    hooks_.copy(whole_prompt[shared_blocks(request)], sample.blocks.back());
  }
}

// Blocks that the residents will likely take beyond those they hold.
int64_t Scheduler::likely_growth() const {
  int64_t blocks = 0;
  for (const Resident& resident : residents_) {
    const PromptRequest& request = prompts_[resident.prompt].request;
    blocks += resident.sample == kWholePrompt
                  ? likely_forks(request, resident.slots)
                  : std::max<int64_t>(0, likely_blocks(request, resident.known) - std::ssize(resident.blocks));
  }
  return blocks;
}

int64_t Scheduler::slots_taken() const {
  int64_t slots = 0;
  for (const Resident& resident : residents_) slots += resident.slots;
  return slots;
}

// Rows that are due beyond one for every sample that decodes.
int64_t Scheduler::rows_to_compute() const {
  int64_t rows = 0;
  for (const Resident& resident : residents_) rows += resident.decodes() ? 0 : resident.known - resident.cached;
  return rows;
}

// A sample that decodes has one row for certain. All others, and rows of a draft, come out of the budget.
void Scheduler::add_item(Resident& resident, int64_t& budget) {
  // The last token of a draft is compared, never fed.
  const int64_t end = resident.known + std::max<int64_t>(resident.draft - 1, 0);
  const int64_t certain = resident.decodes() ? 1 : 0;
  int64_t rows = std::min(end - resident.cached, certain + budget);
  if (resident.cached + rows > resident.known && !allocate_for(resident, resident.cached + rows)) {
    rows = std::ssize(resident.blocks) * kKvTile - resident.cached;
  }
  if (rows == 0) return;
  budget -= rows - certain;
  const int64_t stop = resident.cached + rows;
  Prompt& prompt = prompts_[resident.prompt];
  const bool whole = resident.sample == kWholePrompt;
  const int64_t computed_before = whole ? prompt.computed : resident.known - 1;
  const int64_t recomputed = std::clamp<int64_t>(computed_before - resident.cached, 0, rows);
  if (whole) prompt.computed = std::max(prompt.computed, stop);
  const int64_t first_draw = std::min(stop, std::max(resident.cached, resident.known - 1));
  items_.push_back({resident.prompt, resident.sample, resident.cached, rows, first_draw, recomputed, &resident.blocks});
}

void Scheduler::finish_pass(const std::vector<Outcome>& outcomes) {
  size_t expected = 0;
  for (const PassItem& item : items_) {
    if (item.draws() > 0) expected += item.sample == kWholePrompt ? prompts_[item.prompt].request.samples : 1;
  }
  if (outcomes.size() != expected) throw std::logic_error("Scheduler::finish_pass: one outcome a sample that draws");
  std::vector<bool> leaves(residents_.size());
  const Outcome* next = outcomes.data();
  for (size_t i = 0; i < items_.size(); ++i) {
    Resident& resident = residents_[item_residents_[i]];
    resident.cached += items_[i].rows;
    if (items_[i].draws() == 0) continue;
    if (resident.sample == kWholePrompt) {
      next = finish_prompt(resident, next);
      leaves[item_residents_[i]] = true;
    } else {
      leaves[item_residents_[i]] = finish_sample(resident, *next++);
    }
  }
  size_t kept = 0;
  for (size_t i = 0; i < residents_.size(); ++i) {
    if (leaves[i]) continue;
    if (kept != i) residents_[kept] = std::move(residents_[i]);
    ++kept;
  }
  residents_.resize(kept);
  items_.clear();
}

const Outcome* Scheduler::finish_prompt(Resident& resident, const Outcome* outcomes) {
  Prompt& prompt = prompts_[resident.prompt];
  const PromptRequest& request = prompt.request;
  for (int64_t i = 0; i < request.samples; ++i) {
    if (outcomes[i].finished) continue;
    const int64_t draft = request.drafts.empty() || !outcomes[i].on_draft ? 0 : request.drafts[i] - outcomes[i].tokens;
    waiting_.push_back({resident.prompt, prompt.first_sample + i, request.prompt_length + outcomes[i].tokens, draft});
    ++prompt.waiting;
  }
  prompt.held = std::move(resident.blocks);
  if (prompt.waiting == 0) release(prompt.held);
  return outcomes + request.samples;
}

bool Scheduler::finish_sample(Resident& resident, const Outcome& outcome) {
  if (outcome.finished) {
    release(resident.blocks);
    return true;
  }
  resident.known += outcome.tokens;
  resident.draft = outcome.on_draft ? std::max<int64_t>(resident.draft - outcome.tokens, 0) : 0;
  resident.cached = std::min(resident.cached, resident.known - 1);  // rows of a draft that did not hold are void
  release(resident.blocks, blocks_for(resident.known));
  return false;
}

void Scheduler::release(Blocks& blocks, int64_t keep) {
  while (std::ssize(blocks) > keep) {
    if (pool_.release(blocks.back())) hooks_.freed(blocks.back());
    blocks.pop_back();
  }
}

}  // namespace hybrid
