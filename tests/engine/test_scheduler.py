"""The scheduler with a model that only remembers what it was told to write where."""

from __future__ import annotations

import random

import pytest

from hybrid_kernels import native_module
from tests.engine.scheduler_oracle import Request, Trace, play, random_requests

Scheduler = native_module().Scheduler


def enough(requests: list[Request], max_batch: int) -> int:
    return Scheduler.enough_blocks([r.native() for r in requests], max_batch)


def least(requests: list[Request]) -> int:
    return max(r.native().least_blocks for r in requests)


def run_with_enough(requests: list[Request], max_batch: int, max_prefill_rows: int = 512) -> Trace:
    return play(requests, max_batch, max_prefill_rows, enough(requests, max_batch))


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_random_queues_finish_with_every_token_in_its_place(seed: int, drafts: bool) -> None:
    rng = random.Random(seed)
    requests = random_requests(rng, rng.randrange(1, 9), drafts)
    max_batch, max_prefill_rows = rng.randrange(1, 9), rng.choice([1, 7, 64, 100, 512])
    fewest = least(requests)
    blocks = rng.choice([fewest, fewest + rng.randrange(0, 6), enough(requests, max_batch)])
    trace = play(requests, max_batch, max_prefill_rows, blocks)
    assert sorted(trace.finished) == list(range(sum(r.samples for r in requests)))
    assert trace.prompt_rows == sum(r.prompt_length for r in requests)


@pytest.mark.parametrize("seed", range(60, 90))
def test_more_blocks_than_enough_change_nothing(seed: int) -> None:
    rng = random.Random(seed)
    requests = random_requests(rng, 6)
    max_batch, max_prefill_rows = rng.randrange(1, 9), rng.choice([16, 64, 512])
    blocks = enough(requests, max_batch)
    lean, rich = (
        play(requests, max_batch, max_prefill_rows, count) for count in (blocks, 10 * blocks)
    )
    assert lean == rich
    assert lean.preemptions == lean.recomputed == 0


def test_the_longest_expected_prompt_is_first_and_ties_keep_their_order() -> None:
    requests = [Request(3, 9, 1, [9], expected) for expected in (1.0, 5.0, 5.0, 2.0)]
    assert play(requests, 1, 512, 4).started == [1, 2, 3, 0]


def test_without_expectations_the_queue_keeps_its_order() -> None:
    requests = [Request(length, 9, 1, [9]) for length in (3, 9, 1)]
    assert play(requests, 1, 512, 4).started == [0, 1, 2]


def test_slots_refill_without_a_pause() -> None:
    requests = [Request(4, 40, 1, [length]) for length in (40, 2, 2, 2, 2, 2, 2, 2)]
    trace = run_with_enough(requests, max_batch=2)
    assert trace.passes == 40  # the seven short ones ran beside the long one
    assert trace.rows[1:5] == [2, 5, 2, 5]  # each refill's four rows in a pass of the long one


def test_running_samples_go_on_beside_a_long_prompt_in_chunks() -> None:
    requests = [Request(4, 30, 1, [30]), Request(100, 2, 1, [2])]
    trace = run_with_enough(requests, max_batch=2, max_prefill_rows=16)
    assert trace.rows[:8] == [16, 17, 17, 17, 17, 17, 9, 2]


def test_a_prompt_is_computed_once_for_all_its_samples() -> None:
    requests = [Request(100, 10, 8, [10] * 8)]
    trace = run_with_enough(requests, max_batch=8)
    assert trace.rows == [100] + [8] * 9
    assert trace.copies == 7  # the last sample takes over the partial block
    assert trace.peak_blocks == 1 + 8


def test_samples_of_a_prompt_of_whole_blocks_copy_nothing() -> None:
    requests = [Request(128, 3, 4, [3] * 4)]
    trace = run_with_enough(requests, max_batch=4)
    assert trace.copies == 0
    assert trace.peak_blocks == 2 + 4


def test_more_samples_than_slots_wait_with_the_prompt_in_the_cache() -> None:
    requests = [Request(70, 20, 6, [20] * 6), Request(10, 5, 1, [5])]
    trace = run_with_enough(requests, max_batch=2)
    assert trace.prompt_rows == 80
    assert trace.recomputed == 0


def test_prompts_are_packed_up_to_the_row_budget_and_long_ones_are_cut() -> None:
    requests = [Request(length, 1, 1, [1]) for length in (30, 30, 100, 10)]
    assert run_with_enough(requests, max_batch=4, max_prefill_rows=64).rows == [64, 64, 42]


def test_one_token_responses_need_no_slot_and_no_further_block() -> None:
    requests = [Request(64, 1, 5, [1] * 5), Request(64, 9, 2, [1, 1])]
    trace = play(requests, max_batch=1, max_prefill_rows=512, blocks=2)
    assert trace.decode_rows == 0
    assert sorted(trace.finished) == list(range(7))


def test_the_least_pool_serves_one_sample_at_a_time() -> None:
    requests = [Request(65, 64, 3, [64] * 3)]
    blocks = least(requests)
    trace = play(requests, max_batch=8, max_prefill_rows=512, blocks=blocks)
    assert trace.peak_blocks == blocks == 2
    # The first sample takes over the prompt's blocks; the others compute its 65 rows again.
    assert trace.recomputed == 2 * 65
    assert trace.passes == 3 * 63 + 1


def test_the_youngest_is_preempted_and_computes_its_tokens_again() -> None:
    # Each is admitted with room for one tile more than it has, and in the end needs three blocks.
    requests = [Request(60, 130, 1, [130]), Request(60, 130, 1, [130])]
    trace = play(requests, max_batch=2, max_prefill_rows=512, blocks=4)
    assert trace.preemptions == 1
    # At 128 cached tokens both need a third block. The second sample gives its own two, and comes
    # back with 129 known tokens when the first has ended.
    assert trace.recomputed == 128
    assert trace.finished == [0, 1]
    assert trace.decode_rows == 2 * 129


def test_a_preempted_sample_shares_its_siblings_prompt_again() -> None:
    requests = [Request(128, 200, 3, [200, 140, 200])]
    trace = play(requests, max_batch=3, max_prefill_rows=512, blocks=10)
    # At 256 cached tokens all three need a fifth block, and the third sample makes room. It comes
    # back at the end of the second, beside the first: its own 128 rows are computed again, the
    # prompt's are not.
    assert trace.preemptions == 1
    assert trace.recomputed == 128


def test_expected_lengths_prevent_preemptions() -> None:
    def preemptions(expected: float) -> int:
        requests = [Request(60, 130, 1, [130], expected) for _ in range(6)]
        return play(requests, max_batch=6, max_prefill_rows=512, blocks=6).preemptions

    assert preemptions(130.0) == 0 < preemptions(0.0)


def test_a_draft_that_holds_takes_two_passes() -> None:
    requests = [Request(10, 50, 1, [50], drafts=[(50, 50)])]
    trace = run_with_enough(requests, max_batch=1)
    assert trace.rows == [10, 49]  # the prompt gives the first token, the draft's rows all others
    assert trace.decode_rows == 1
    assert trace.draft_rows == 48


def test_behind_the_first_wrong_token_of_a_draft_a_sample_decodes() -> None:
    requests = [Request(10, 50, 2, [50, 50], drafts=[(30, 50), (0, 50)])]
    trace = run_with_enough(requests, max_batch=2)
    # Tokens 1 to 30 held, the row of the thirtieth drew the next; the other sample started anew.
    assert trace.rows[:2] == [10, 49 + 1]
    assert trace.passes == 1 + 49


def test_drafts_share_the_row_budget() -> None:
    requests = [Request(10, 50, 1, [50], drafts=[(50, 50)]) for _ in range(2)]
    trace = run_with_enough(requests, max_batch=2, max_prefill_rows=20)
    assert trace.rows[:3] == [20, 22, 22]


def test_an_empty_queue_is_done() -> None:
    assert play([], 4, 64, 0).finished == []


def test_a_request_larger_than_the_pool_is_refused() -> None:
    pool = native_module().KvBlockPool(2)
    request = Request(129, 2, 1, [2]).native()
    with pytest.raises(RuntimeError, match="exceeds the whole pool"):
        Scheduler([request], 1, 64, pool, lambda a, b: None, lambda b: None)


def test_outcomes_must_match_the_pass() -> None:
    pool = native_module().KvBlockPool(2)
    queue = [Request(3, 2, 1, [2]).native()]
    scheduler = Scheduler(queue, 1, 64, pool, lambda a, b: None, lambda b: None)
    scheduler.next_pass()
    with pytest.raises(RuntimeError, match="one outcome a sample that draws"):
        scheduler.finish_pass([])
