"""Advantages, whitening and PPO losses of a batch of responses.

Per-token tensors are ``[B, T]`` float32 with a boolean mask of the same shape. Everything is summed
in float64, in an order that does not depend on the number of threads. Losses are sums over the
mask: the caller divides by the token count of the whole accumulation batch over all ranks, so that
gradients depend on neither micro-batch nor world size.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hybrid_kernels.ops._dispatch import register, use_native
from hybrid_kernels.reference import rlhf as reference


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over each response's own tokens (Schulman et al., 2016).

    ``delta_t = r_t + gamma V_{t+1} - V_t``, ``A_t = delta_t + gamma lam A_{t+1}``, ``returns = A +
    V``; the value after a response's last token is 0.

    Args:
        rewards: ``[B, T]`` float32.
        values: ``[B, T]`` float32, of the state before each token.
        lengths: ``[B]`` int64 in [0, T], tokens of each response.
        gamma: discount.
        lam: lambda, the weight of longer returns.

    Returns:
        ``(advantages, returns)``, each ``[B, T]`` float32, zero past a response's length; returns
        come before any whitening. Without gradient.
    """
    if not use_native("gae", rewards, values):
        return reference.gae(rewards, values, lengths, gamma, lam)
    return torch.ops.hybrid_kernels.gae(rewards, values, lengths, gamma, lam)


@torch.no_grad()
def masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations of ``x`` where ``mask`` holds: ``[3]`` float64.

    Zeros when the mask is empty. :func:`combine_moments` joins those of several ranks.
    """
    if not use_native("masked_moments", x):
        return reference.masked_moments(x, mask)
    return torch.ops.hybrid_kernels.masked_moments(x, mask)


def combine_moments(moments: Tensor) -> Tensor:
    """Moments of a union from those of its parts (Chan, Golub and LeVeque, 1979).

    Args:
        moments: ``[P, 3]`` from :func:`masked_moments`.

    Returns:
        ``[3]`` float64.
    """
    count, mean, squares = moments.double().unbind(1)
    total = count.sum()
    joint_mean = (count * mean).sum() / total.clamp(min=1)
    joint_squares = (squares + count * (mean - joint_mean).square()).sum()
    return torch.stack([total, joint_mean, joint_squares])


@torch.no_grad()
def masked_whiten(
    x: Tensor, mask: Tensor, moments: Tensor | None = None, shift_mean: bool = True
) -> Tensor:
    """Whitens ``x`` over ``mask``: ``(x - mean) / sqrt(var + 1e-8)``, with Bessel's variance.

    Args:
        x: any shape, float32.
        mask: bool, like ``x``.
        moments: ``[3]`` float64 from :func:`masked_moments` or :func:`combine_moments`; of ``x``
            itself by default.
        shift_mean: False adds the mean back, as reward whitening does.
    """
    if not use_native("masked_whiten", x):
        moments = reference.masked_moments(x, mask) if moments is None else moments
        return reference.masked_whiten(x, mask, moments, shift_mean)
    moments = masked_moments(x, mask) if moments is None else moments
    return torch.ops.hybrid_kernels.masked_whiten(x, mask, moments, shift_mean)


@dataclass(frozen=True)
class PolicyStats:
    """Sums over the mask of one :func:`ppo_policy_loss`; adding two joins their tokens.

    With d the log ratio of new to old policy, cut at +-20, and r = exp(d).
    """

    count: float
    clipped_low: float  # tokens whose gradient the clip removes, at r < 1 - clip_low
    clipped_high: float  # at r > 1 + clip_high
    kl_k2: float  # d^2 / 2
    kl_k3: float  # r - 1 - d (Schulman, "Approximating KL divergence", 2020)
    ratio: float
    ratio_max: float  # the greatest, not a sum

    def __add__(self, other: PolicyStats) -> PolicyStats:
        sums = (a + b for a, b in zip(astuple(self), astuple(other), strict=True))
        return replace(PolicyStats(*sums), ratio_max=max(self.ratio_max, other.ratio_max))


@dataclass(frozen=True)
class ValueStats:
    """Sums over the mask of one :func:`ppo_value_loss`; adding two joins their tokens."""

    count: float
    clipped: float  # tokens whose gradient the clip removes
    error: float  # returns - values
    error_square: float
    target: float  # returns
    target_square: float

    def __add__(self, other: ValueStats) -> ValueStats:
        return ValueStats(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def explained_variance(self) -> float:
        """``1 - Var(returns - values) / Var(returns)``; NaN where the returns do not vary."""
        if self.count == 0:
            return float("nan")
        variance = self.target_square - self.target**2 / self.count
        unexplained = self.error_square - self.error**2 / self.count
        return 1.0 - unexplained / variance if variance > 0 else float("nan")


def ppo_policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
) -> tuple[Tensor, PolicyStats]:
    """PPO's clipped surrogate, summed over the mask (Schulman et al., 2017).

    ``max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high))`` with ``r = exp(logprob - old_logprob)``,
    the exponent cut at +-20 (no gradient beyond).

    Args:
        logprob: ``[B, T]`` float32, the policy being trained; gets the gradient.
        old_logprob: ``[B, T]`` float32, the policy that sampled.
        advantages: ``[B, T]`` float32.
        mask: ``[B, T]`` bool.
        clip_low: in [0, 1].
        clip_high: at least 0; above ``clip_low`` for clip-higher.
        dual_clip: c > 1 bounds the loss by ``-c A`` where A < 0 (Ye et al., 2020); 0 for none.

    Returns:
        ``(loss_sum, stats)``; ``loss_sum`` is a float64 scalar. The gradient is formed in the
        forward pass.
    """
    arguments = (logprob, old_logprob, advantages, mask, clip_low, clip_high, dual_clip)
    if use_native("ppo_policy_loss", logprob, old_logprob, advantages):
        loss_sum, _, stats = torch.ops.hybrid_kernels.ppo_policy_loss(*arguments)
    else:
        loss_sum, stats = reference.ppo_policy_loss(*arguments)
    return loss_sum, PolicyStats(*stats.tolist())


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, ValueStats]:
    """PPO's clipped value loss, summed over the mask.

    ``0.5 max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2)``

    Args:
        values: ``[B, T]`` float32; gets the gradient.
        old_values: ``[B, T]`` float32, as computed with the rollout.
        returns: ``[B, T]`` float32.
        mask: ``[B, T]`` bool.
        clip: at least 0; ``inf`` for the plain squared error.

    Returns:
        ``(loss_sum, stats)``; ``loss_sum`` is a float64 scalar. The gradient is formed in the
        forward pass.
    """
    arguments = (values, old_values, returns, mask, clip)
    if use_native("ppo_value_loss", values, old_values, returns):
        loss_sum, _, stats = torch.ops.hybrid_kernels.ppo_value_loss(*arguments)
    else:
        loss_sum, stats = reference.ppo_value_loss(*arguments)
    return loss_sum, ValueStats(*stats.tolist())


# What torch must know. Both losses return (loss_sum, its gradient, statistics); only the gradient
# is saved.


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, grad, stats = output
    ctx.mark_non_differentiable(grad, stats)
    ctx.save_for_backward(grad)
    ctx.arguments = len(inputs)


def _loss_backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    (grad,) = ctx.saved_tensors
    return ((grad_loss * grad).to(grad.dtype), *[None] * (ctx.arguments - 1))


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_loss(statistics: int) -> Any:
    def fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss_sum = x.new_empty((), dtype=torch.float64)
        return loss_sum, _like(x), x.new_empty(statistics, dtype=torch.float64)

    return fake


register("gae", lambda rewards, *_: (_like(rewards), _like(rewards)))
register("masked_moments", lambda x, mask: x.new_empty(3, dtype=torch.float64))
register("masked_whiten", lambda x, *_: _like(x))
register("ppo_policy_loss", _fake_loss(7), setup_context=_loss_setup, backward=_loss_backward)
register("ppo_value_loss", _fake_loss(6), setup_context=_loss_setup, backward=_loss_backward)
