"""KL divergence from the policy to its reference: estimators from samples, and the penalty's
weight.

With x ~ pi and d = log pi(x) - log ref(x) (Schulman, "Approximating KL Divergence", 2020):

    k1 = d               unbiased for KL(pi || ref), high variance, may be negative
    k3 = exp(-d) - 1 + d unbiased, never negative

The sign of d in k3 is what makes it KL(pi || ref): exp(d) - 1 - d estimates nothing under pi.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybrid_engine.config import KLConfig

_LOG_RATIO_LIMIT = 20.0
_K3_LIMIT = 10.0


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d, elementwise; the form that goes into PPO's reward."""
    return logprobs - ref_logprobs


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(-d) - 1 + d with d clamped to +-20 and the result to at most 10.

    Without the clamps one token that the reference finds impossible makes a batch's KL billions;
    with them the estimate is biased low where d < -2.6 or so.
    """
    d = (logprobs - ref_logprobs).clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    return (torch.expm1(-d) + d).clamp(max=_K3_LIMIT)


class FixedKL:
    """A weight that stays."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl_per_sequence: float, num_sequences: int) -> None:
        """Nothing moves."""

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coef = float(state["coef"])


class AdaptiveKL(FixedKL):
    """Steers the KL of a whole sequence towards a target (Ziegler et al., 2019, section 2.2).

        e = clip(KL / target - 1, -0.2, 0.2),   coef <- coef (1 + e n / horizon)

    with n the sequences that the measurement covers.
    """

    def __init__(self, coef: float, target: float, horizon: int) -> None:
        super().__init__(coef)
        self.target = target
        self.horizon = horizon

    def update(self, kl_per_sequence: float, num_sequences: int) -> None:
        error = min(max(kl_per_sequence / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * num_sequences / self.horizon


def make_kl_controller(config: KLConfig) -> FixedKL:
    """Adaptive when a target is set, fixed otherwise."""
    if config.target > 0:
        return AdaptiveKL(config.coef, config.target, config.horizon)
    return FixedKL(config.coef)
