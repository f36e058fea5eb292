"""PPO's losses as sums over tokens. Whoever calls divides by the token count of the whole batch.

Statistics are sums over the same tokens, so they add up over micro-batches and ranks
(:class:`hybrid_engine.rl.metrics.Averages`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hybrid_engine.config import PPOConfig
from hybrid_kernels.ops.rlhf import PolicyStats, ValueStats, ppo_policy_loss, ppo_value_loss


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, config: PPOConfig
) -> tuple[Tensor, PolicyStats]:
    """Clipped surrogate (Schulman et al., 2017), asymmetric as in DAPO, dual-clipped on request.

        r = exp(clamp(logp - old, -20, 20))
        L = sum over mask of max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high))
        with dual_clip c > 0, where A < 0:  L_t <- min(L_t, -A c)          (Ye et al., 2020)

    At r = 1 the loss is -sum(A), and its gradient that of REINFORCE. All tensors [B, T], mask bool.
    """
    loss, stats = ppo_policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        config.clip_low,
        config.clip_high,
        config.dual_clip,
    )
    return loss, stats


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, config: PPOConfig
) -> tuple[Tensor, ValueStats]:
    """Clipped squared error of the critic.

        L = sum over mask of 0.5 max((V - R)^2, (clamp(V, V_old - c, V_old + c) - R)^2)

    value_clip 0 leaves the plain squared error. All tensors [B, T], mask bool.
    """
    clip = config.value_clip if config.value_clip > 0 else math.inf
    loss, stats = ppo_value_loss(values, old_values, returns, mask, clip)
    return loss, stats


def entropy_loss(entropies: Tensor, mask: Tensor, coef: float) -> tuple[Tensor, float]:
    """-coef sum over mask of H_t: a bonus for staying undecided. H in nats, [B, T] like the mask.

    Returns the loss and the summed entropy. With coef 0 the loss is a zero without gradient.
    """
    kept = torch.where(mask, entropies, torch.zeros_like(entropies))
    total = kept.sum()
    loss = -coef * total if coef else total.detach() * 0.0
    return loss, float(total.detach())


def ptx_loss(logprobs: Tensor, coef: float) -> Tensor:
    """-coef sum of log p over the target tokens [N] of demonstrations (Ouyang et al., 2022,
    PPO-ptx).

    Normalise it by the demonstrations' own token count, not by the rollout's.
    """
    return -coef * logprobs.sum()
