"""What is known about the running stage; the displays draw it, the reporter changes it."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hybrid_engine.report.clock import PhaseClock
from hybrid_engine.report.text import duration, number

HISTORY = 24  # points of a sparkline

# Metrics worth a glance, in the order shown; metrics.jsonl has all of them.
HEADLINES = {
    "reward": "reward",
    "kl": "kl",
    "loss": "loss",
    "policy_loss": "policy",
    "value_loss": "value",
    "entropy": "entropy",
    "accuracy": "accuracy",
    "margin": "margin",
    "response_length": "length",
    "grad_norm": "grad",
    "actor_grad_norm": "grad",
    "lr": "lr",
    "actor_lr": "lr",
    "tokens_per_second_generate": "gen tok/s",
    "tokens_per_second_train": "train tok/s",
    "heldout_loss": "heldout loss",
    "heldout_accuracy": "heldout accuracy",
    "heldout_reward": "heldout reward",
}
UNKNOWN_SHOWN = 5  # of a line without any headline


def headlines(values: Mapping[str, Any]) -> dict[str, Any]:
    """Label -> value of the metrics worth a glance."""
    chosen = {label: values[key] for key, label in HEADLINES.items() if key in values}
    if any(not key.startswith("tokens_per_second") for key in HEADLINES if key in values):
        return chosen
    scalars = {key: value for key, value in values.items() if isinstance(value, (int, float))}
    return dict(list(scalars.items())[:UNKNOWN_SHOWN]) | chosen


@dataclass
class StageView:
    """Progress of one stage. `done` counts finished iterations, `start` those of an earlier
    process.
    """

    name: str
    total: int
    start: int
    clock: PhaseClock
    done: int = 0
    phase_done: int = 0
    phase_total: int = 0
    latest: dict[str, Any] = field(default_factory=dict)
    history: dict[str, deque[float]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=HISTORY))
    )

    def __post_init__(self) -> None:
        self.done = self.start

    @property
    def phase(self) -> str:
        return self.clock.current.name if self.clock.current else ""

    def seconds_left(self) -> float | None:
        """At the pace of this process so far; None before its first iteration."""
        done = self.done - self.start
        return self.clock.elapsed() / done * max(self.total - self.done, 0) if done > 0 else None

    def record(self, iteration: int, values: Mapping[str, Any]) -> None:
        self.done = max(self.done, iteration)
        shown = headlines(values)
        self.latest.update(shown)
        for label, value in shown.items():
            if isinstance(value, (int, float)):
                self.history[label].append(value)

    def progress(self) -> str:
        return f"{self.done}/{self.total}"

    def line(self, iteration: int, values: Mapping[str, Any]) -> str:
        """One iteration in one aligned line, for files and pipes."""
        width = len(str(self.total))
        parts = [f"{self.name:<6} {iteration:>{width}}/{self.total}"]
        parts += [f"{label} {number(value):>9}" for label, value in headlines(values).items()]
        return "  ".join([*parts, f"left {duration(self.seconds_left()):>7}"])

    def phase_line(self) -> str:
        rate = self.clock.rate()
        speed = f"  {rate:.0f} tok/s" if rate else ""
        share = f"{self.phase_done}/{self.phase_total}"
        return f"{self.name:<6} {self.progress()}  {self.phase} {share}{speed}"
