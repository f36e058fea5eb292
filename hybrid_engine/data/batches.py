"""The order of training: which examples make which step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Batches:
    """Index lists of the optimizer steps, a pure function of the arguments.

    The stream of samples is one permutation of ``range(count)`` after the other, each seeded by
    (seed, epoch), and is cut into batches of ``batch_size``; a batch may straddle two epochs, and
    only the very last may be short. ``epochs`` may be a fraction; 0 means as many as ``max_steps``
    needs. ``max_steps`` > 0 bounds the steps.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, epochs: float, max_steps: int = 0
    ) -> None:
        if count <= 0 or batch_size <= 0:
            raise ValueError(
                f"Batches: count is {count} and batch_size {batch_size}; both must be positive"
            )
        if epochs < 0 or max_steps < 0 or (epochs == 0 and max_steps == 0):
            raise ValueError(
                f"Batches: epochs is {epochs} and max_steps {max_steps}; one must be positive"
            )
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self._samples = max(1, round(epochs * count)) if epochs else max_steps * batch_size
        if max_steps:
            self._samples = min(self._samples, max_steps * batch_size)
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def __len__(self) -> int:
        return math.ceil(self._samples / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return self.from_step(0)

    def from_step(self, step: int) -> Iterator[list[int]]:
        """The batches from ``step`` on: exactly those of a run that was never interrupted."""
        return (self.batch(index) for index in range(step, len(self)))

    def batch(self, step: int) -> list[int]:
        first = step * self.batch_size
        last = min(first + self.batch_size, self._samples)
        return [
            int(self._permutation(at // self.count)[at % self.count]) for at in range(first, last)
        ]

    def _permute(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)


def rank_share(batch: Sequence[T], rank: int, world: int) -> list[T]:
    """The part of a global batch that ``rank`` of ``world`` works on: every ``world``-th element.

    The shares are disjoint, together the whole, and differ in size by at most one; a batch shorter
    than ``world`` leaves some empty.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank_share: rank {rank} is outside a world of {world}")
    return list(batch[rank::world])
