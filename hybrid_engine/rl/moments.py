"""Count, mean and sum of squared deviations: moments that combine exactly over parts and over time.

Transport form: a float64 tensor [3] = (n, mean, M2). Chan, Golub, LeVeque (1979); the sequential
case is Welford's (1962).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# A standard deviation below this, relative to the mean (or to 1), is rounding: dividing by it would
# turn equal scores into enormous ones.
FLAT = 1e-6


def moments_of(x: Tensor) -> Tensor:
    """Moments of all elements of x, float64 [3]; an empty x gives (0, 0, 0)."""
    x = x.detach().double().flatten()
    if x.numel() == 0:
        return torch.zeros(3, dtype=torch.float64)
    mean = x.mean()
    return torch.stack(
        [torch.tensor(float(x.numel()), dtype=torch.float64), mean, ((x - mean) ** 2).sum()]
    )


def combine_moments(parts: Tensor) -> Tensor:
    """Moments of the union of disjoint parts: [R, 3] -> [3], folded in row order (deterministic).

    n = n_a + n_b,  d = mean_b - mean_a,  mean = mean_a + d n_b / n,  M2 = M2_a + M2_b + d^2 n_a
    n_b / n
    """
    count, mean, m2 = 0.0, 0.0, 0.0
    for part_count, part_mean, part_m2 in parts.double().tolist():
        if part_count == 0:
            continue
        total = count + part_count
        delta = part_mean - mean
        mean += delta * part_count / total
        m2 += part_m2 + delta * delta * count * part_count / total
        count = total
    return torch.tensor([count, mean, m2], dtype=torch.float64)


def variance_of(moments: Tensor) -> float:
    """Sample variance (Bessel) of moments [3]; zero for fewer than two elements."""
    count, _, m2 = moments.tolist()
    return m2 / (count - 1) if count > 1 else 0.0


class RunningMoments:
    """Mean and standard deviation of everything seen so far; its state is three numbers."""

    def __init__(self) -> None:
        self._moments = torch.zeros(3, dtype=torch.float64)

    def update(self, batch: Tensor) -> None:
        """Take in the moments [3] of a batch, combined over all ranks beforehand."""
        self._moments = combine_moments(torch.stack([self._moments, batch.double()]))

    @property
    def count(self) -> float:
        return float(self._moments[0])

    @property
    def mean(self) -> float:
        return float(self._moments[1])

    @property
    def std(self) -> float:
        """A number to divide by: 1 while everything seen is equal up to rounding."""
        std = math.sqrt(variance_of(self._moments))
        return std if std > FLAT * max(abs(self.mean), 1.0) else 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"moments": self._moments.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._moments = torch.tensor(state["moments"], dtype=torch.float64)
