"""From token rewards to advantages: GAE, whitening over the global batch, and sequence scores
spread out."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hybrid_engine.rl.padding import length_mask
from hybrid_kernels.ops import rlhf as ops

# Combines this rank's moments [3] with those of all ranks; the identity in a process that is alone.
ReduceMoments = Callable[[Tensor], Tensor]


def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both [B, T] (Schulman et al., 2016).

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   returns = A + V

    V after a row's last token is zero, and so is everything past its length. Returns are of the
    advantages as they are here, before any whitening.
    """
    return ops.gae(rewards, values, lengths, gamma, lam)


def whiten(
    x: Tensor, mask: Tensor, reduce_moments: ReduceMoments, shift_mean: bool = True
) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the masked tokens of all ranks; zero elsewhere.

    Mean and (Bessel's) variance belong to the whole batch of the iteration, so this runs once a
    rollout and never a minibatch. Every rank must call it, with an empty mask if need be.
    """
    moments = reduce_moments(ops.masked_moments(x, mask))
    return ops.masked_whiten(x, mask, moments=moments, shift_mean=shift_mean)


def per_token(sequence_advantages: Tensor, lengths: Tensor, width: int) -> Tensor:
    """One advantage a sequence [B] on each of its tokens: [B, width], zero past the length."""
    return sequence_advantages.float().unsqueeze(1) * length_mask(lengths, width)
