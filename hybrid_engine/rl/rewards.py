"""From scores of whole responses to rewards of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_engine.config import RewardShapingConfig
from hybrid_engine.errors import UserError
from hybrid_engine.rl.moments import RunningMoments


@dataclass(frozen=True)
class ShapedScores:
    """Scores [B] after shaping, and how many responses each rule touched."""

    scores: Tensor
    missing_eos: int
    overlong: int
    clipped: int


def check_scores(scores: Tensor, origin: str = "reward") -> None:
    """Refuse scores that are not numbers.

    Raises:
        UserError: naming the first such sample.
    """
    bad = torch.nonzero(~torch.isfinite(scores)).flatten()
    if len(bad):
        first = int(bad[0])
        raise UserError(
            f"{origin} gave {float(scores[first])} for sample {first} of {len(scores)} "
            f"({len(bad)} such samples); "
            "a score must be a finite number"
        )


def shape_scores(
    scores: Tensor,
    finished: Tensor,
    lengths: Tensor,
    max_new_tokens: int,
    config: RewardShapingConfig,
    moments: RunningMoments,
) -> ShapedScores:
    """Shape raw scores [B]; the order of the rules matters.

    1. normalise by running moments: "scale" z = R / sigma, "standardize" z = (R - mu) / sigma. The
       caller has updated `moments` with this batch (of all ranks) already, so the first batch has
       a scale too.
    2. missing EOS: R -= missing_eos_penalty where the response was cut (not `finished` [B] bool).
    3. overlong (DAPO, Yu et al., 2025): with buffer b and limit L = max_new_tokens,
       R -= overlong_factor (n - (L - b)) / b for responses of n > L - b tokens.
    4. clip: R <- clamp(R, -clip, clip).
    """
    check_scores(scores)
    shaped = _normalise(scores.float(), config.normalize, moments)
    cut = ~finished
    shaped = shaped - config.missing_eos_penalty * cut
    excess = torch.zeros_like(shaped)
    if config.overlong_buffer > 0:
        start = max_new_tokens - config.overlong_buffer
        excess = ((lengths - start) / config.overlong_buffer).clamp(0.0, 1.0)
        shaped = shaped - config.overlong_factor * excess
    limit = config.clip if config.clip > 0 else torch.inf
    clipped = shaped.abs() > limit
    return ShapedScores(
        scores=shaped.clamp(-limit, limit),
        missing_eos=int(cut.sum()) if config.missing_eos_penalty else 0,
        overlong=int((excess > 0).sum()),
        clipped=int(clipped.sum()),
    )


def _normalise(scores: Tensor, how: str, moments: RunningMoments) -> Tensor:
    if how == "none":
        return scores
    if how == "scale":
        return scores / moments.std
    return (scores - moments.mean) / moments.std


def token_rewards(scores: Tensor, kl: Tensor, lengths: Tensor, kl_coef: float) -> Tensor:
    """Rewards of tokens, [B, T]: r_t = -kl_coef kl_t, plus the score at the last token.

    The last token is the EOS, or the cut: what the value of the state before it must predict.
    A response without a token earns nothing. `kl` [B, T] is k1 and carries no gradient.
    """
    inside = torch.arange(kl.shape[1], device=kl.device) < lengths.unsqueeze(1)
    rewards = torch.where(inside, -kl_coef * kl, torch.zeros_like(kl))
    rows = torch.nonzero(lengths > 0).flatten()
    rewards[rows, lengths[rows] - 1] += scores[rows].to(rewards.dtype)
    return rewards
