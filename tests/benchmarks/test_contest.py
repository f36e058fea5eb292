"""What a contest compares."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.contest import OURS, Outcome, contest


class OneRound:
    """pytest-benchmark's fixture, as far as a contest uses it."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, run: Any, setup: Any, rounds: int, iterations: int) -> None:
        setup()
        run()


def test_the_phase_that_counts_is_compared_and_not_what_told_it_apart() -> None:
    benchmark = OneRound()
    ours = Outcome(8, {"prefill": 1.0, "decode": 2.0, "whole": 3.0})
    theirs = Outcome(8, {"prefill": 6.0, "decode": 6.0, "whole": 12.0})
    contest(benchmark, lambda: ours, {"theirs": lambda: theirs})
    info = SimpleNamespace(**benchmark.extra_info)
    assert info.speedup == {"theirs": 4.0}
    assert info.contenders[OURS]["median_seconds"] == 3.0


def test_contenders_that_did_less_are_told() -> None:
    with pytest.raises(AssertionError):
        contest(OneRound(), lambda: Outcome(8), {"theirs": lambda: Outcome(7)})
