"""Layers streamed in every pass: rounds, and what ends a rollout on one rank and not on another."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hybrid_engine.distributed.collectives import rank
from hybrid_engine.engine import HybridEngine, SamplingParams, partial_rollout
from hybrid_engine.errors import UserError
from tests.distributed.ranks import results_of, run_ranks
from tests.distributed.test_gather import Case, limit_of, make_engine, train_step
from tests.distributed.test_gather_ragged import with_timeout
from tests.models.peers import save_causal

pytestmark = pytest.mark.multi_process

STREAMED = Case("llama-uneven", pinned=0)
PROMPTS = [[5, 6, 7], [8] * 20, [9]]
LENGTHS = (4, 17)  # of responses on either rank


class EnoughError(Exception):
    """What a callback raises."""


def params(tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=tokens, seed=3, ignore_eos=True)


def generate(engine: HybridEngine, tokens: int, **options: Any) -> Any:
    return engine.generate(PROMPTS, params(tokens), sample_ids=[0, 1, 2], **options)


def rounds_of(engine: HybridEngine) -> int:
    counters = engine.gathered
    assert counters is not None
    return counters.rounds


def unequal(directory: str) -> dict[str, Any]:
    """Rollouts of different length; of one rank alone; of none; then after a step, two in a row."""
    plans: list[str] = []
    engine = make_engine(directory, STREAMED, 3)
    engine._on_plan = plans.append
    found: dict[str, Any] = {}
    rollout = generate(engine, LENGTHS[rank()])
    found["unequal"] = [rollout.tokens, rollout.counters["passes"], rounds_of(engine)]
    with engine.generation():
        if rank() == 1:
            rollout = generate(engine, 5)
            found["alone"] = rollout.tokens
    found["rounds alone"] = rounds_of(engine)
    with engine.generation():
        pass
    found["rounds of none"] = rounds_of(engine)
    engine.generate([])
    train_step(engine)
    with engine.generation():
        twice = [generate(engine, LENGTHS[rank() - which]) for which in range(2)]
    found["twice"] = [rollout.tokens for rollout in twice]
    found["captured"] = twice[0].logprobs
    lengths = [len(prompt) for prompt in PROMPTS]
    scored = engine.token_logprobs(twice[0].sequences, lengths)
    found["scored"] = [row.tolist() for row in scored]
    return {**found, "plans": plans}


def everything(directory: str) -> dict[str, Any]:
    """One start of two ranks for all of it; the last leaves their group broken."""
    return {scene.__name__: scene(directory) for scene in (unequal, endings, limits, breaking)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_causal("llama-uneven", root / "llama-uneven")
    return root


@pytest.fixture(scope="module")
def ranks(directory: Path) -> list[dict[str, Any]]:
    return results_of(f"{__name__}:everything", 2, directory)


def test_ranks_of_unequal_length(ranks, directory) -> None:
    alone = HybridEngine(STREAMED.model(directory), None)
    for who, found in enumerate(results["unequal"] for results in ranks):
        tokens, passes, rounds = found["unequal"]
        assert tokens == generate(alone, LENGTHS[who]).tokens
        assert passes == LENGTHS[who]
        # Some layers are always ahead, and a rank that begins late misses rounds.
        assert max(LENGTHS) < rounds <= sum(LENGTHS) + 2
        assert 5 < found["rounds alone"] <= 5 + 2
        assert found["rounds of none"] == 0
        short, long = sorted(found["twice"], key=lambda tokens: len(tokens[0]))
        assert [len(answer) for answer in short + long] == [LENGTHS[0]] * 3 + [LENGTHS[1]] * 3
        assert [answer[: LENGTHS[0]] for answer in long] == short
        assert found["captured"] == found["scored"]
        (plan,) = found["plans"]
        assert plan.startswith("generation keeps 0 of 3 layers and streams 3 through 2 places: ")
    assert ranks[1]["unequal"]["alone"] == generate(alone, 5).tokens


def endings(directory: str) -> dict[str, Any]:
    """Whatever ends a rollout on rank 1 leaves rank 0's alone, and the next one."""
    engine, found = make_engine(directory, STREAMED, 3), {}
    limits = [1, 12, 12]
    for name, error in (("callback", EnoughError("enough")), ("ctrl-c", KeyboardInterrupt())):

        def stop(done: int, total: int, tokens: int, error: BaseException = error) -> None:
            if rank() == 1 and done:
                raise error

        try:
            rollout = generate(engine, 12, on_progress=stop, max_new_tokens=limits)
            found[name] = rollout.tokens
        except (EnoughError, KeyboardInterrupt) as caught:
            partial = partial_rollout(caught)
            assert partial is not None
            found[name] = [type(caught).__name__, partial.samples]
    try:  # refused by the program before its first pass
        engine.generate([[1, 2]], params(2), drafts=[[-1]] if rank() == 1 else None)
        found["refused"] = "nothing"
    except UserError as refused:
        found["refused"] = str(refused)
    found["after"] = generate(engine, 12).tokens
    return found


def test_what_ends_a_rollout_on_one_rank(ranks, directory) -> None:
    first, second = (results["endings"] for results in ranks)
    whole = generate(HybridEngine(STREAMED.model(directory), None), 12).tokens
    assert first["callback"] == first["ctrl-c"] == [whole[0][:1], *whole[1:]]
    assert second["callback"] == ["EnoughError", [0]]
    assert second["ctrl-c"] == ["KeyboardInterrupt", [0]]
    assert first["refused"] == "nothing"
    assert "draft 0" in second["refused"]
    assert first["after"] == second["after"] == whole


def breaking(directory: str) -> str:
    """Rank 1's thread breaks down in the middle of a rollout."""
    with_timeout(2)
    engine = make_engine(directory, STREAMED, 3)
    generate(engine, 3)
    real, calls = dist.all_gather_into_tensor, []

    def broken(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if rank() == 1 and len(calls) == 20:
            raise OSError("out of luck")
        return real(*arguments, **options)

    dist.all_gather_into_tensor = broken
    with pytest.raises(RuntimeError) as caught:
        generate(engine, 30)
    return str(caught.value)


def test_a_thread_that_breaks_down_ends_all_ranks(ranks) -> None:
    messages = [results["breaking"] for results in ranks]
    for message in messages:
        assert message.startswith("gathering the weights for generation: ")
        assert message.endswith("look at the other ranks' output for the cause")
    assert "out of luck" in messages[1]


def killed(directory: str, results: str) -> None:
    """Rank 1 is killed in the middle of a rollout; rank 0 writes down what it is told."""
    engine = make_engine(directory, STREAMED, 3)
    generate(engine, 3)

    def die(sample: int, token: int) -> None:
        die.tokens += 1
        if rank() == 1 and die.tokens == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    die.tokens = 0
    with pytest.raises(RuntimeError) as caught:
        generate(engine, 30, on_token=die)
    Path(results).write_text(str(caught.value))


def test_a_killed_rank_ends_the_others(directory, tmp_path) -> None:
    told = tmp_path / "told"
    done = run_ranks(f"{__name__}:killed", 2, str(directory), str(told))
    assert done.returncode != 0
    assert told.read_text().startswith("gathering the weights for generation: ")


def limits(directory: str) -> dict[str, str]:
    found = {}
    engine = make_engine(directory, STREAMED, 3)
    engine.weight_bytes = limit_of(STREAMED, engine.model) - (1 if rank() == 1 else 0)
    with pytest.raises(UserError) as refused:
        engine.generate([])
    found["short"] = str(refused.value)
    engine.merge_adapters, engine.weight_bytes = True, 1
    with pytest.raises(UserError) as refused:
        engine.generate([])
    return {**found, "merged": str(refused.value)}


def test_limits_that_cannot_be_kept_are_refused_on_all_ranks(ranks) -> None:
    for found in (results["limits"] for results in ranks):
        assert "with 0 of 3 layers kept and the others streamed" in found["short"]
        assert "leave out merge_adapters or weight_bytes" in found["merged"]
