"""Ranks with unequal work, late and lost ranks, slow links."""

from __future__ import annotations

import dataclasses
import random
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks.slow_link import slow_all_gathers
from hybrid_engine.distributed import process_group
from hybrid_engine.distributed.collectives import all_reduce_max, rank
from hybrid_engine.engine import HybridEngine, SamplingParams
from tests.distributed.ranks import results_of
from tests.distributed.test_gather import Case, make_engine, train_step
from tests.models.peers import VOCAB, save_causal

pytestmark = pytest.mark.multi_process

ROUNDS, FEW_ROUNDS, SCORED_EVERY = 200, 20, 10
ALL_TOKENS = tuple(range(VOCAB))


def one_round(engine: HybridEngine, draw: random.Random) -> Any:
    """Any number of rollouts, some of no prompt, some ending with their first token."""
    rollout = None
    with engine.generation():
        for _ in range(draw.choice((0, 1, 1, 2))):
            count = draw.randrange(4)
            prompts = [[draw.randrange(VOCAB)] * draw.randrange(1, 40) for _ in range(count)]
            stops = draw.choice(((), (5, 6), ALL_TOKENS))
            params = SamplingParams(max_new_tokens=draw.randrange(1, 20), stop_token_ids=stops)
            rollout = engine.generate(prompts, params)
            if stops == ALL_TOKENS:
                assert all(len(tokens) == 1 for tokens in rollout.tokens)
    return rollout


PINNED, STREAMED = Case("llama-uneven"), Case("llama-uneven", pinned=0)


def few_rounds(directory: str) -> int:
    return fuzz(directory, FEW_ROUNDS, PINNED)


def few_streamed_rounds(directory: str) -> int:
    return fuzz(directory, FEW_ROUNDS, STREAMED)


def all_rounds(directory: str) -> int:
    return fuzz(directory, ROUNDS, PINNED)


def all_streamed_rounds(directory: str) -> int:
    return fuzz(directory, ROUNDS, STREAMED)


def fuzz(directory: str, rounds: int, case: Case) -> int:
    """Every rank draws its own rounds; weights change between them. Returns what was compared."""
    engine = make_engine(directory, case, 3)
    draw = random.Random(rank())
    compared = 0
    for number in range(1, rounds + 1):
        rollout = one_round(engine, draw)
        if number % SCORED_EVERY:
            continue
        sequences = rollout.sequences if rollout else []
        lengths = [len(prompt) for prompt in rollout.prompts] if rollout else []
        scored = engine.token_logprobs(sequences, lengths)
        captured = rollout.logprobs if rollout else []
        assert [row.tolist() for row in scored] == captured
        compared += len(captured)
        train_step(engine)
    return compared


@pytest.mark.slow
@pytest.mark.parametrize("rounds", ["all_rounds", "all_streamed_rounds"])
def test_random_ragged_rounds(tmp_path: Path, rounds: str) -> None:
    save_causal("llama-uneven", tmp_path / "llama-uneven")
    compared = results_of(f"{__name__}:{rounds}", 3, tmp_path)
    assert min(compared) > 10


@pytest.mark.parametrize("rounds", ["few_rounds", "few_streamed_rounds"])
def test_a_few_ragged_rounds(tmp_path: Path, rounds: str) -> None:
    save_causal("llama-uneven", tmp_path / "llama-uneven")
    compared = results_of(f"{__name__}:{rounds}", 2, tmp_path)
    assert sum(compared) > 0


def with_timeout(seconds: float) -> None:
    world = process_group.initialise()
    process_group._world = dataclasses.replace(world, timeout=timedelta(seconds=seconds))


def lost_ranks(directory: str) -> dict[str, str]:
    """Rank 1 breaks down in the middle of a gather; later it does not come at all."""
    with_timeout(2)
    engine = make_engine(directory, Case("llama-uneven"), 3)
    engine.generate([[1, 2]])
    found = {}
    real, calls = dist.all_gather_into_tensor, []

    def broken(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if rank() == 1 and len(calls) == 2:
            raise OSError("out of luck")
        return real(*arguments, **options)

    dist.all_gather_into_tensor = broken
    with pytest.raises(RuntimeError) as caught:
        engine.generate([[1, 2]] if rank() == 0 else [])
    found["broken"] = str(caught.value)
    dist.all_gather_into_tensor = real
    if rank() == 1:
        time.sleep(3)  # longer than rank 0 waits
    else:
        with pytest.raises(RuntimeError) as caught:
            engine.generate([[1, 2]])
        found["missing"] = str(caught.value)
    return found


def test_lost_ranks_are_noticed(tmp_path: Path) -> None:
    save_causal("llama-uneven", tmp_path / "llama-uneven")
    first, second = results_of(f"{__name__}:lost_ranks", 2, tmp_path)
    for found in (first, second):
        assert found["broken"].startswith("gathering the weights for generation: ")
        assert found["broken"].endswith("look at the other ranks' output for the cause")
    assert "out of luck" in second["broken"]
    assert "'gathering the weights for generation' for rank 1 (last seen at " in first["missing"]


def overlapped(directory: str) -> dict[str, float]:
    """One rollout over a link that takes twice as long as the prefill does."""
    engine = make_engine(directory, Case("llama-deep"), 3)
    prompts = [[i + 1] * 40 for i in range(12)]
    delay = 0.0
    for _ in range(3):  # the first one also touches all memory for the first time
        with slow_all_gathers(delay):
            rollout = engine.generate(prompts, SamplingParams(max_new_tokens=1))
        counters = engine.gathered
        computing = rollout.counters["prefill_seconds"] - counters.waited_seconds
        delay = 2 * all_reduce_max(computing) / counters.collectives
    return {"computing": computing, "hidden": counters.seconds - counters.waited_seconds}


def test_the_gather_hides_behind_the_prefill(tmp_path: Path) -> None:
    """What is computed before the last part arrives; gathering first would hide nothing."""
    save_causal("llama-deep", tmp_path / "llama-deep")
    for found in results_of(f"{__name__}:overlapped", 2, tmp_path):
        assert found["hidden"] > 0.5 * found["computing"]
