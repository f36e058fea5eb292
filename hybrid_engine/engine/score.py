"""Scoring of given responses by the training forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hybrid_engine.engine.passes import Pass, passes
from hybrid_engine.models import TokenScores


@torch.no_grad()
def score_responses(
    forward: Callable[..., TokenScores],
    sequences: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    temperature: float,
    max_tokens: int,
    thresholds: Sequence[Sequence[float]] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities and entropies of the tokens after each prompt, one fp32 tensor a sequence.

    ``forward`` is a language model, or the engine that trains it. Packed passes hold at most
    ``max_tokens`` tokens, a longer sequence has one of its own. ``thresholds``, one a scored token,
    make it the scores of truncated sampling. Every rank must call this.
    """
    logprobs: list[Tensor] = [torch.empty(0)] * len(sequences)
    entropies: list[Tensor] = [torch.empty(0)] * len(sequences)
    lists = [list(sequence) for sequence in sequences]
    for part in passes(lists, prompt_lengths, max_tokens):
        scores = forward(
            part.batch, part.rows, part.targets, temperature, None, _of_pass(thresholds, part)
        )
        sizes = [len(lists[i]) - max(prompt_lengths[i], 1) for i in part.samples]
        for i, logprob, entropy in zip(
            part.samples, scores.logprobs.split(sizes), scores.entropies.split(sizes), strict=True
        ):
            logprobs[i], entropies[i] = logprob, entropy
    return logprobs, entropies


def _of_pass(thresholds: Sequence[Sequence[float]] | None, part: Pass) -> Tensor | None:
    if thresholds is None:
        return None
    flat = [value for i in part.samples for value in thresholds[i]]
    return torch.tensor(flat, dtype=torch.float32)
