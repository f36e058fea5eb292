"""Averages that are right over micro-batches and ranks, and the diagnostics of a PPO update.

Sums and counts travel; ratios are taken last. A mean of per-micro-batch means would weigh a short
micro-batch like a long one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping

from torch import Tensor

from hybrid_engine.rl.largest import largest
from hybrid_engine.rl.moments import variance_of
from hybrid_kernels.ops.rlhf import PolicyStats, ValueStats

# Collects every rank's dictionary; `lambda own: [own]` in a process that is alone.
Gather = Callable[[dict[str, dict[str, float]]], list[dict[str, dict[str, float]]]]


class Averages:
    """Weighted means and maxima by name; a nan makes its name's result nan."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._maxima: dict[str, float] = {}

    def add(self, name: str, total: float | Tensor, weight: float) -> None:
        """Add a sum over `weight` elements (tokens, sequences, groups)."""
        self._totals[name] = self._totals.get(name, 0.0) + float(total)
        self._weights[name] = self._weights.get(name, 0.0) + float(weight)

    def add_all(self, totals: Mapping[str, float], weight: float) -> None:
        for name, total in totals.items():
            self.add(name, total, weight)

    def add_max(self, name: str, value: float) -> None:
        self._maxima[name] = largest([self._maxima.get(name, -math.inf), value])

    def result(self, gather: Gather) -> dict[str, float]:
        """Means and maxima over everything added on all ranks. Every rank calls this; names may
        differ.

        A name whose weight is zero everywhere is left out: it has no mean.
        """
        parts = gather({"totals": self._totals, "weights": self._weights, "maxima": self._maxima})
        totals, weights, maxima = Counter[str](), Counter[str](), dict[str, float]()
        for part in parts:
            totals.update(part["totals"])
            weights.update(part["weights"])
            for name, value in part["maxima"].items():
                maxima[name] = largest([maxima.get(name, -math.inf), value])
        return {n: totals[n] / weights[n] for n in totals if weights[n] > 0} | maxima


def explained_variance(error_moments: Tensor, return_moments: Tensor) -> float:
    """1 - Var(R - V) / Var(R), from the moments [3] of errors and returns over all ranks.

    1: the critic knows; 0: no better than a constant; below: worse. nan if the returns do not vary.
    """
    spread = variance_of(return_moments)
    return 1.0 - variance_of(error_moments) / spread if spread > 0 else math.nan


def response_statistics(lengths: Tensor, finished: Tensor) -> dict[str, tuple[float, float]]:
    """Name -> (total, weight) for :meth:`Averages.add`: mean length, share that ended with an
    EOS."""
    count = float(len(lengths))
    return {
        "response_length": (float(lengths.sum()), count),
        "eos_rate": (float(finished.sum()), count),
    }


def add_policy_stats(averages: Averages, stats: PolicyStats) -> None:
    """Log names of a policy loss's sums; `approx_kl` estimates KL(old || new), 0 before the first
    update."""
    sums = {
        "ratio": stats.ratio,
        "approx_kl": stats.kl_k3,
        "approx_kl_k2": stats.kl_k2,
        "clip_fraction_low": stats.clipped_low,
        "clip_fraction_high": stats.clipped_high,
    }
    averages.add_all(sums, stats.count)
    averages.add_max("ratio_max", stats.ratio_max)


def add_value_stats(averages: Averages, stats: ValueStats) -> None:
    averages.add_all(
        {"value_error": stats.error_square, "value_clip_fraction": stats.clipped}, stats.count
    )
