"""Advantages without a critic: each answer against the other answers to its prompt.

Scores are [B] with the G samples of a prompt consecutive, so a group never spans two ranks.
Every function returns one advantage a sequence, [B]; :func:`hybrid_engine.rl.advantages.per_token`
spreads them over the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STD_EPS = 1e-6
# Scores of a group that differ by less, relative to their size, count as equal: dividing the
# rounding of their mean by its own standard deviation would turn noise into advantages of order
# one.
_FLAT_TOLERANCE = 1e-6


def grpo(scores: Tensor, group_size: int) -> Tensor:
    """A_i = (R_i - mean_g) / (std_g + eps), sample std (Shao et al., 2024). G = 1: A = R."""
    groups = _groups(scores, group_size)
    if group_size == 1:
        return scores.clone()
    centred = groups - groups.mean(1, keepdim=True)
    std = groups.std(1, keepdim=True)
    return torch.where(_flat(groups), 0.0, centred / (std + _STD_EPS)).flatten()


def dr_grpo(scores: Tensor, group_size: int) -> Tensor:
    """A_i = R_i - mean_g: without the division that favours easy and hard prompts (Liu et al.,
    2025).

    G = 1: A = R.
    """
    if group_size == 1:
        return scores.clone()
    groups = _groups(scores, group_size)
    return (groups - groups.mean(1, keepdim=True)).flatten()


def rloo(scores: Tensor, group_size: int) -> Tensor:
    """A_i = R_i - mean of the other G - 1 scores (Kool et al., 2019; Ahmadian et al., 2024). G =
    1: A = R."""
    if group_size == 1:
        return scores.clone()
    groups = _groups(scores, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()


def reinforce_baseline(scores: Tensor, group_size: int) -> Tensor:
    """A_i = R_i - mean_g, to be whitened over the tokens of the whole batch (REINFORCE++-baseline,
    Hu, 2025).

    The whitening is the caller's, who can reduce moments over ranks. G = 1: A = R.
    """
    return dr_grpo(scores, group_size)


ESTIMATORS = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_baseline": reinforce_baseline,
}


def zero_std_groups(scores: Tensor, group_size: int) -> tuple[int, int]:
    """(groups whose scores are all equal, groups): the former teach nothing, worth logging."""
    groups = _groups(scores, group_size)
    return int(_flat(groups).sum()), len(groups)


def _groups(scores: Tensor, group_size: int) -> Tensor:
    if group_size < 1 or scores.dim() != 1 or len(scores) % group_size:
        raise ValueError(f"scores {tuple(scores.shape)} do not divide into groups of {group_size}")
    return scores.reshape(-1, group_size)


def _flat(groups: Tensor) -> Tensor:
    """Bool [groups, 1]: all scores of the group are equal."""
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    return high - low <= _FLAT_TOLERANCE * torch.maximum(low.abs(), high.abs()).clamp(min=1.0)
