"""Generating under ZeRO-3 on two ranks: ``pytest benchmarks/bench_gather.py --benchmark-only``.

The ranks stay up and do what they are told, so each contender's call is timed from outside, from
the word to the last rank's answer. They share this machine's cores and talk over gloo.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.contest import Contender, Outcome, contest, rounds_of
from benchmarks.crew import Crew
from benchmarks.gather_tasks import PROMPTS
from benchmarks.models import Cost, smollm2

RANKS, PROMPT, NEW = 2, 32, 32
FULL_PASS = 64  # tokens a prompt: a prefill of 512 rows, all in the pass that meets the gate
PINNED = 14  # layers, where the others are streamed
LINK_PREFILLS = (0.5, 1.0, 2.0)  # of the slowed link, in prefills


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    ranks = Crew(RANKS, "benchmarks.gather_tasks:make_tasks", str(smollm2()))
    yield ranks
    ranks.close()


def contender(crew: Crew, task: str, **options: Any) -> Contender:
    def run() -> Outcome:
        results = crew(task, length=PROMPT, new_tokens=NEW, **options)
        answers = [answer for result in results for answer in result["tokens"]]
        assert [len(answer) for answer in answers] == [NEW] * PROMPTS * RANKS
        return Outcome(len(answers) * NEW, results[0]["phases"])

    return run


def bench_generate_zero3(benchmark: Any, crew: Crew) -> None:
    """SmolLM2-135M, 8 prompts a rank, 32 + 32 tokens, temperature 1."""
    tokens = [
        [
            result["tokens"]
            for result in crew(task, length=PROMPT, new_tokens=2, greedy=True, **more)
        ]
        for task, more in (
            ("ours", {"stage": 3}),
            ("ours", {"stage": 3, "pinned": PINNED}),
            ("ours", {"stage": 0}),
            ("transformers", {}),
        )
    ]
    assert all(found == tokens[0] for found in tokens)  # and everybody is warm
    rivals = {
        "hybrid_engine, ZeRO-0": contender(crew, "ours", stage=0),
        f"hybrid_engine, ZeRO-3, {PINNED} of 30 layers kept": contender(
            crew, "ours", stage=3, pinned=PINNED
        ),
        "transformers, DeepSpeed's ZeRO-3 hooks": contender(crew, "transformers"),
    }
    flops = Cost.of(smollm2()).generate_flops([PROMPT] * PROMPTS, [NEW] * PROMPTS) * RANKS
    info = {"kind": "ranks", "ranks": RANKS, "flops": flops}
    contest(benchmark, contender(crew, "ours", stage=3), rivals, info=info, rounds=2)


@pytest.mark.parametrize("prefills", LINK_PREFILLS)
def bench_gather_overlap(benchmark: Any, crew: Crew, prefills: float) -> None:
    """A link so slow that the gather alone takes about so many prefills, each collective equally
    long: prefilling while gathering should take the longer of the two, not their sum.
    """
    plain = crew("overlap", length=FULL_PASS, seconds=0.0)[0]
    delay = max(0.0, prefills * plain["prefill"] / plain["collectives"])
    rounds: list[dict[str, float]] = []
    benchmark.pedantic(
        lambda: rounds.append(crew("overlap", length=FULL_PASS, seconds=delay)[0]),
        rounds=rounds_of(2),
    )
    medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    longer = max(medians["gather"], medians["prefill"])
    benchmark.extra_info.update(
        kind="overlap",
        link_seconds=delay * plain["collectives"],
        without_delay=plain,
        seconds=medians,
        maximum=longer,
        sum=medians["gather"] + medians["prefill"],
        over_maximum=medians["together"] / longer,
    )
