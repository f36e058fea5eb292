"""Advantages, whitening and PPO losses in plain torch: statistics of responses, [B, T]."""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
WHITEN_EPS = 1e-8


def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over each row's first ``lengths[b]`` tokens.

    Schulman et al., "High-dimensional continuous control using generalized advantage estimation",
    2016.

    ``delta_t = r_t + gamma V_{t+1} - V_t``, ``A_t = delta_t + gamma lam A_{t+1}`` and
    ``returns = A + V``. The value after the last token is zero, and so are results past a length.
    """
    steps = rewards.shape[1]
    inside = torch.arange(steps, device=rewards.device) < lengths.unsqueeze(1)
    reward, value = (x.double().masked_fill(~inside, 0.0) for x in (rewards, values))
    advantages = torch.zeros_like(value)
    next_value = torch.zeros_like(value[:, 0])
    next_advantage = torch.zeros_like(next_value)
    for t in range(steps - 1, -1, -1):
        delta = reward[:, t] + gamma * next_value - value[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * inside[:, t]
        next_value = value[:, t]
        advantages[:, t] = next_advantage
    return advantages.to(rewards.dtype), (advantages + value).to(rewards.dtype)


def masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations where ``mask`` holds: [3] float64, or zeros."""
    kept = x[mask].double()
    if kept.numel() == 0:
        return torch.zeros(3, dtype=torch.float64, device=x.device)
    mean = kept.mean()
    return torch.stack([mean.new_tensor(float(kept.numel())), mean, (kept - mean).square().sum()])


def masked_whiten(x: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool) -> Tensor:
    """``(x - mean) / sqrt(var + 1e-8)`` where ``mask`` holds, zero elsewhere; Bessel's variance.

    ``shift_mean=False`` leaves the mean in place: ``(x - mean) / std + mean``.
    """
    count, mean, squares = moments.double().unbind()
    variance = squares / (count - 1).clamp(min=1)
    white = (x.double() - mean) / (variance + WHITEN_EPS).sqrt()
    if not shift_mean:
        white = white + mean
    return torch.where(mask, white, torch.zeros_like(white)).to(x.dtype)


def ppo_policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate summed over the mask (Schulman et al., 2017), and its statistics.

    ``max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high))`` with ``r = exp(logprob - old_logprob)``;
    with ``dual_clip`` c > 0, at most ``-c A`` where A < 0.

    Returns:
        ``(loss_sum [] float64, stats [7] float64)``; the statistics are those of
        :class:`hybrid_kernels.ops.rlhf.PolicyStats`, in its order. Differentiable in ``logprob``.
    """
    new, old = logprob[mask].double(), old_logprob[mask].double()
    advantage = advantages[mask].double()
    log_ratio = (new - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    plain = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, clipped)
    if dual_clip > 0:
        loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * dual_clip), loss)
    binding = clipped > plain
    stats = _sums(
        torch.ones_like(ratio),
        binding & (ratio < 1),
        binding & (ratio > 1),
        0.5 * log_ratio.square(),
        log_ratio.expm1() - log_ratio,
        ratio,
    )
    largest = ratio.detach().max() if ratio.numel() else ratio.new_zeros(())
    return loss.sum(), torch.cat([stats, largest.reshape(1)])


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """``0.5 max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2)`` summed over the mask.

    Returns:
        ``(loss_sum [] float64, stats [6] float64)``; the statistics are those of
        :class:`hybrid_kernels.ops.rlhf.ValueStats`, in its order. Differentiable in ``values``.
    """
    value, old, target = values[mask].double(), old_values[mask].double(), returns[mask].double()
    plain = (value - target).square()
    clipped = (torch.clamp(value, old - clip, old + clip) - target).square()
    error = target - value
    stats = _sums(
        torch.ones_like(error),
        clipped > plain,
        error,
        error.square(),
        target,
        target.square(),
    )
    return 0.5 * torch.maximum(plain, clipped).sum(), stats


def _sums(*per_token: Tensor) -> Tensor:
    return torch.stack([x.detach().double().sum() for x in per_token])
