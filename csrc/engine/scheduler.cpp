#include "engine/scheduler.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace hybrid {
namespace {

// The last token of a response is never fed back, so it needs no room.
int64_t max_kv(const PromptRequest& request) { return request.prompt_length + request.max_new - 1; }

int64_t shared_blocks(const PromptRequest& request) { return request.prompt_length / kKvTile; }

bool has_partial_block(const PromptRequest& request) { return request.prompt_length % kKvTile != 0; }

// Blocks that one sample allocates beyond the prompt's. The last sample to leave the prompt takes over its partial
// block; the others copy it. A sample that ends with its first token allocates nothing.
int64_t own_blocks(const PromptRequest& request, bool last) {
  if (request.max_new == 1) return 0;
  const int64_t beyond = blocks_for(max_kv(request)) - shared_blocks(request);
  return last && has_partial_block(request) ? beyond - 1 : beyond;
}

}  // namespace

int64_t Scheduler::least_blocks(const PromptRequest& request) {
  return blocks_for(request.prompt_length) + own_blocks(request, request.samples == 1);
}

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
  for (const PromptRequest& request : queue) {
    if (least_blocks(request) > pool.size()) throw std::logic_error("Scheduler: a request exceeds the whole pool");
    prompts_.push_back({request, 0, 0, {}});
    queue_.push_back(static_cast<int64_t>(queue_.size()));
  }
  std::stable_sort(queue_.begin(), queue_.end(), [this](int64_t a, int64_t b) {
    return prompts_[a].request.expected_new > prompts_[b].request.expected_new;
  });
}

std::vector<PrefillChunk> Scheduler::next_prefill() {
  std::vector<PrefillChunk> chunks;
  int64_t room = limits_.max_prefill_rows;
  size_t next = 0;  // prompts of prefilling_ that have a chunk in this pass
  while (room > 0) {
    if (next == prefilling_.size()) {
      if (queue_.empty() || !can_admit(prompts_[queue_.front()])) break;
      admit(prompts_[queue_.front()]);
      prefilling_.push_back(queue_.front());
      queue_.pop_front();
    }
    const int64_t index = prefilling_[next++];
    Prompt& prompt = prompts_[index];
    const int64_t rows = std::min(room, prompt.request.prompt_length - prompt.prefilled);
    const int64_t start = prompt.prefilled;
    prompt.prefilled += rows;
    room -= rows;
    chunks.push_back({index, start, rows, &prompt.blocks, prompt.prefilled == prompt.request.prompt_length});
  }
  return chunks;
}

bool Scheduler::can_admit(const Prompt& prompt) const {
  // Waiting samples hold memory, so they go first: no new prompt while one waits, and at most the last one admitted has
  // more samples than there are slots for.
  return waiting_.empty() && live() + expected_live_ < limits_.max_batch &&
         least_blocks(prompt.request) <= unpromised();
}

void Scheduler::admit(Prompt& prompt) {
  for (int64_t i = blocks_for(prompt.request.prompt_length); i > 0; --i) prompt.blocks.push_back(pool_.allocate());
  promised_ += own_blocks(prompt.request, prompt.request.samples == 1);
  expected_live_ += prompt.request.samples;
}

void Scheduler::finish_prefill(int64_t index, const std::vector<int64_t>& survivors) {
  Prompt& prompt = prompts_[index];
  const auto place = std::find(prefilling_.begin(), prefilling_.end(), index);
  if (place == prefilling_.end() || prompt.prefilled != prompt.request.prompt_length) {
    throw std::logic_error("Scheduler::finish_prefill: the prompt is not in its last prefill pass");
  }
  prefilling_.erase(place);
  promised_ -= own_blocks(prompt.request, prompt.request.samples == 1);
  expected_live_ -= prompt.request.samples;
  prompt.waiting = static_cast<int64_t>(survivors.size());
  for (const int64_t sample : survivors) waiting_.push_back({sample, index});
  if (survivors.empty()) release(prompt.blocks);
  activate_waiting();
}

void Scheduler::activate_waiting() {
  while (!waiting_.empty() && live() < limits_.max_batch && try_activate(waiting_.front())) waiting_.pop_front();
}

bool Scheduler::try_activate(const Waiting& waiting) {
  Prompt& prompt = prompts_[waiting.prompt];
  const bool last = prompt.waiting == 1;
  const int64_t promise = own_blocks(prompt.request, last);
  if (promise > unpromised()) return false;
  --prompt.waiting;
  promised_ += promise;
  LiveSample sample{waiting.sample, waiting.prompt, prompt.request.prompt_length, promise, fork_blocks(prompt, last)};
  if (!last && has_partial_block(prompt.request)) {
    --sample.promised;  // the copied partial block
    --promised_;
  }
  live_.push_back(std::move(sample));
  return true;
}

std::vector<int32_t> Scheduler::fork_blocks(Prompt& prompt, bool last) {
  if (last) return std::exchange(prompt.blocks, {});
  std::vector<int32_t> blocks(prompt.blocks.begin(), prompt.blocks.begin() + shared_blocks(prompt.request));
  for (const int32_t block : blocks) pool_.retain(block);
  if (has_partial_block(prompt.request)) {
    // Copied now, not at its first write: that write is the sample's very next step.
    blocks.push_back(pool_.allocate());
    hooks_.copy(prompt.blocks.back(), blocks.back());
  }
  return blocks;
}

std::vector<LiveSample>& Scheduler::prepare_decode() {
  for (LiveSample& sample : live_) {
    if (sample.kv_len == static_cast<int64_t>(sample.blocks.size()) * kKvTile) {
      if (sample.promised == 0) throw std::logic_error("Scheduler: a sample outgrew what it was promised");
      sample.blocks.push_back(pool_.allocate());
      --sample.promised;
      --promised_;
    }
    ++sample.kv_len;
  }
  return live_;
}

void Scheduler::finish_decode(const std::vector<bool>& finished) {
  if (finished.size() != live_.size()) throw std::logic_error("Scheduler::finish_decode: one flag a live sample");
  size_t kept = 0;
  for (size_t i = 0; i < live_.size(); ++i) {
    if (finished[i]) {
      release(live_[i].blocks);
      promised_ -= live_[i].promised;
    } else {
      if (kept != i) live_[kept] = std::move(live_[i]);
      ++kept;
    }
  }
  live_.erase(live_.begin() + static_cast<int64_t>(kept), live_.end());
  activate_waiting();
}

void Scheduler::release(const std::vector<int32_t>& blocks) {
  for (const int32_t block : blocks) {
    if (pool_.release(block)) hooks_.freed(block);
  }
}

}  // namespace hybrid
