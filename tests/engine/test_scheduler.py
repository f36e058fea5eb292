"""The scheduler with a model that only remembers where it was told to write."""

from __future__ import annotations

import random

import pytest

from hybrid_kernels import native_module
from tests.engine.scheduler_oracle import Request, play, random_requests

Scheduler, PromptRequest = native_module().Scheduler, native_module().PromptRequest


def native(request: Request) -> object:
    return PromptRequest(request.prompt_length, request.max_new, request.samples, request.expected)


def enough(requests: list[Request], max_batch: int) -> int:
    return Scheduler.enough_blocks([native(r) for r in requests], max_batch)


@pytest.mark.parametrize("seed", range(40))
def test_random_queues_finish_with_every_token_in_its_place(seed: int) -> None:
    rng = random.Random(seed)
    requests = random_requests(rng, rng.randrange(1, 9))
    max_batch, max_prefill_rows = rng.randrange(1, 9), rng.choice([1, 7, 64, 100, 512])
    least = max(native(r).least_blocks for r in requests)
    blocks = rng.choice([least, least + rng.randrange(0, 6), enough(requests, max_batch)])
    trace = play(requests, max_batch, max_prefill_rows, blocks)
    assert sorted(trace.finished) == list(range(sum(r.samples for r in requests)))


@pytest.mark.parametrize("seed", range(40, 60))
def test_more_blocks_than_enough_change_nothing(seed: int) -> None:
    rng = random.Random(seed)
    requests = random_requests(rng, 6)
    max_batch = rng.randrange(1, 9)
    blocks = enough(requests, max_batch)
    lean, rich = (play(requests, max_batch, 64, count) for count in (blocks, 10 * blocks))
    assert lean.finished == rich.finished
    assert lean.decode_steps == rich.decode_steps
    assert lean.peak_blocks == rich.peak_blocks <= blocks


def test_the_longest_expected_prompt_is_first_and_ties_keep_their_order() -> None:
    requests = [Request(3, 9, 1, [9], expected) for expected in (1.0, 5.0, 5.0, 2.0)]
    assert play(requests, 1, 512, 4).started == [1, 2, 3, 0]


def test_slots_refill_as_samples_end() -> None:
    requests = [Request(4, 40, 1, [length]) for length in (40, 2, 2, 2, 2, 2, 2, 2)]
    trace = play(requests, max_batch=2, max_prefill_rows=512, blocks=enough(requests, 2))
    assert trace.decode_steps == 39  # the seven short ones ran beside the long one
    assert trace.peak_live == 2


def test_a_prompt_is_prefilled_once_for_all_its_samples() -> None:
    requests = [Request(100, 10, 8, [10] * 8)]
    trace = play(requests, max_batch=8, max_prefill_rows=512, blocks=enough(requests, 8))
    assert trace.prefill_rows == [100]
    assert trace.copies == 7  # the last sample takes over the partial block
    assert trace.peak_blocks == 1 + 8


def test_samples_of_a_prompt_of_whole_blocks_copy_nothing() -> None:
    requests = [Request(128, 3, 4, [3] * 4)]
    trace = play(requests, max_batch=4, max_prefill_rows=512, blocks=enough(requests, 4))
    assert trace.copies == 0
    assert trace.peak_blocks == 2 + 4


def test_more_samples_than_slots_wait_with_the_prompt_in_the_cache() -> None:
    requests = [Request(70, 20, 6, [20] * 6), Request(10, 5, 1, [5])]
    trace = play(requests, max_batch=2, max_prefill_rows=512, blocks=enough(requests, 2))
    assert trace.prefill_rows == [70, 10]


def test_prompts_are_packed_up_to_the_row_budget_and_long_ones_are_cut() -> None:
    requests = [Request(length, 2, 1, [2]) for length in (30, 30, 100, 10)]
    trace = play(requests, max_batch=4, max_prefill_rows=64, blocks=enough(requests, 4))
    assert trace.prefill_rows == [64, 64, 42]


def test_the_least_pool_serves_one_sample_at_a_time() -> None:
    requests = [Request(65, 66, 3, [66, 66, 66]) for _ in range(4)]
    blocks = native(requests[0]).least_blocks
    trace = play(requests, max_batch=8, max_prefill_rows=512, blocks=blocks)
    assert trace.peak_blocks == blocks == 4  # the prompt's two, a copy of its second, one more
    assert trace.peak_live == 1
    assert trace.decode_steps == 12 * 65


def test_one_token_responses_need_no_slot_and_no_further_block() -> None:
    requests = [Request(64, 1, 5, [1] * 5), Request(64, 9, 2, [1, 1])]
    trace = play(requests, max_batch=1, max_prefill_rows=512, blocks=3)
    assert trace.decode_steps == 0
    assert sorted(trace.finished) == list(range(7))


def test_an_empty_queue_is_done() -> None:
    assert play([], 4, 64, 0).finished == []


def test_a_request_larger_than_the_pool_is_refused() -> None:
    pool = native_module().KvBlockPool(2)
    with pytest.raises(RuntimeError, match="exceeds the whole pool"):
        Scheduler([PromptRequest(129, 2, 1)], 1, 64, pool, lambda a, b: None, lambda b: None)
