"""Several ways to do one thing, timed in turns.

Every round runs each contender once, ours last, so that a busy moment of the machine meets all of
them. Medians over rounds are compared. Nothing is asserted about time; that the contenders did the
same work is.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

OURS = "hybrid_engine"


def rounds_of(default: int) -> int:
    """HYBRID_BENCH_ROUNDS, or `default`: some rivals take a minute and a half a call."""
    return int(os.environ.get("HYBRID_BENCH_ROUNDS", default))


@dataclass
class Timings:
    """Seconds of every round: of the whole call, and of the phases it is made of."""

    tokens: int
    seconds: list[float] = field(default_factory=list)
    phases: list[Mapping[str, float]] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def phase_medians(self) -> dict[str, float]:
        names = self.phases[0] if self.phases else {}
        return {name: statistics.median(phase[name] for phase in self.phases) for name in names}

    def summary(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "median_seconds": self.median,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.median,
            "phase_seconds": self.phase_medians(),
        }


@dataclass(frozen=True)
class Outcome:
    """What a contender did in one call: useful tokens, seconds of its phases if it knows them.

    A phase "whole" is the work that counts, where a call did more to tell phases apart.
    """

    tokens: int
    phases: Mapping[str, float] = field(default_factory=dict)


Contender = Callable[[], Outcome]


def contest(
    benchmark: Any,
    ours: Contender,
    rivals: Mapping[str, Contender],
    *,
    rounds: int = 3,
    info: Mapping[str, Any] | None = None,
    same_tokens: bool = True,
) -> dict[str, Timings]:
    """Times `ours` with pytest-benchmark and, before each of its calls, every rival.

    Warm everybody up before. The JSON's ``extra_info`` gets ``contenders`` (one summary each),
    ``speedup`` (a rival's median over ours) and `info`.

    Raises:
        AssertionError: a contender made another number of tokens than before, or than ours, unless
            `same_tokens` is False because each draws its own answers.
    """
    timings: dict[str, Timings] = {}

    def record(name: str, contender: Contender) -> None:
        start = time.perf_counter()
        outcome = contender()
        seconds = outcome.phases.get("whole", time.perf_counter() - start)
        entry = timings.setdefault(name, Timings(outcome.tokens))
        if same_tokens:
            assert outcome.tokens == entry.tokens, f"{name}: {outcome.tokens} tokens"
        entry.tokens = outcome.tokens
        entry.seconds.append(seconds)
        entry.phases.append(outcome.phases)

    def run_rivals() -> None:
        for name, contender in rivals.items():
            record(name, contender)

    benchmark.pedantic(
        lambda: record(OURS, ours),
        setup=run_rivals,
        rounds=rounds_of(rounds),
        iterations=1,
    )
    if same_tokens:
        assert len({entry.tokens for entry in timings.values()}) == 1, timings
    mine = timings[OURS].median
    benchmark.extra_info.update(info or {})
    benchmark.extra_info["contenders"] = {name: t.summary() for name, t in timings.items()}
    benchmark.extra_info["speedup"] = {
        name: t.median / mine for name, t in timings.items() if name != OURS
    }
    return timings
