"""A policy whose answers end by themselves after as many tokens as a benchmark wants."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid_engine.engine import HybridEngine, SamplingParams
from hybrid_engine.engine.passes import passes
from hybrid_engine.models import CausalLM

SAMPLES = 8  # answers a prompt that the expectation is taken over
RIDGE = 1e-3  # of the mean square of a hidden state


def with_mean_answer(
    source: Path, prompts: list[list[int]], new_tokens: int, mean: float, directory: Path
) -> Path:
    """A copy of a language model with a tied head that gives its end token, at every place of
    answers to `prompts`, about one probability, such that their expected length is `mean`.

    Only the end token's row of the embedding changes: to the ridge regression, on hidden states of
    sampled answers, of the log of what all tokens together weigh, plus a constant found by
    bisection. As an input the end token never occurs, so nothing else changes.
    """
    engine = HybridEngine.from_pretrained(source)
    hidden, weight = answer_states(engine, prompts, new_tokens)
    rows = hidden.flatten(0, 1)
    gram = rows.T @ rows
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    targets = torch.stack([weight.flatten(), torch.ones(len(rows), dtype=rows.dtype)], 1)
    follow, constant = torch.linalg.solve(gram, rows.T @ targets).unbind(1)

    low, high = -20.0, 5.0
    for _ in range(40):
        shift = (low + high) / 2
        longer = expected_length(hidden @ (follow + shift * constant), weight) > mean
        low, high = (shift, high) if longer else (low, shift)
    save_with_row(source, directory, follow + low * constant)
    return directory


@torch.no_grad()
def answer_states(
    engine: HybridEngine, prompts: list[list[int]], new_tokens: int
) -> tuple[Tensor, Tensor]:
    """Of sampled answers that nothing ends: the hidden state before each token [B, T, h], and the
    log of the summed exponentials of its logits [B, T]; fp64.
    """
    params = SamplingParams(n=SAMPLES, max_new_tokens=new_tokens, ignore_eos=True)
    rollout = engine.generate(prompts, params)
    model = engine.model
    assert isinstance(model, CausalLM)
    (part,) = passes(rollout.sequences, rollout.prompt_lengths, max_tokens=1 << 30)
    hidden = model.decoder(part.batch, rows=part.rows)
    weight = [model.head(chunk)[0].double().logsumexp(-1) for chunk in hidden.split(256)]
    shape = (len(rollout), new_tokens)
    return hidden.double().unflatten(0, shape), torch.cat(weight).unflatten(0, shape)


def expected_length(end_logits: Tensor, weight: Tensor) -> float:
    """Mean length of answers [B, T], the end token included, which comes after each of their
    tokens with a probability p / (1 + p), p = exp(end_logits - weight).
    """
    survives = torch.sigmoid(weight - end_logits)
    alive = torch.cat([torch.ones_like(survives[:, :1]), survives[:, :-1].cumprod(1)], 1)
    return float(alive.sum(1).mean())


def save_with_row(source: Path, directory: Path, row: Tensor) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert model.config.tie_word_embeddings
    with torch.no_grad():
        model.get_input_embeddings().weight[end_token(model)] = row.float()
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)


def end_token(model: Any) -> int:
    ends: int | Sequence[int] = model.generation_config.eos_token_id
    return ends if isinstance(ends, int) else ends[0]
