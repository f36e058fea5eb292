"""Generation for families without a native decoder: transformers' own `generate`.

Its random numbers come from torch's generator, seeded anew for each batch, so that, unlike with
the native program, a sample depends on the batch it is drawn in; and the longest prompt of a batch
decides how much of the context is left for its responses. Log-probabilities and entropies are not
collected here: the caller gets them from the training forward. Drafts are not tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hybrid_engine.engine.request import Request
from hybrid_engine.engine.sampling import SamplingParams
from hybrid_engine.models import ForeignCausalLM


class _Streamer:
    """Hands on the tokens of one sequence; transformers first puts the prompt."""

    def __init__(self, on_token: Callable[[int, int], None]) -> None:
        self._on_token = on_token
        self._prompt_seen = False

    def put(self, tokens: Tensor) -> None:
        if self._prompt_seen:
            for token in tokens.flatten().tolist():
                self._on_token(0, token)
        self._prompt_seen = True

    def end(self) -> None:
        """Part of transformers' interface; there is nothing to close."""


@torch.no_grad()
def foreign_generate(model: ForeignCausalLM, request: Request) -> dict[str, Any]:
    """Tokens, finish reasons and kept mass, one entry a sample.

    ``on_token`` gets a lone sample's tokens as they are drawn, those of several when their batch is
    done: transformers streams single sequences only.
    """
    rows, on_token = request.rows, request.on_token
    streamer = _Streamer(on_token) if on_token is not None and len(rows) == 1 else None
    result: dict[str, list[Any]] = {"tokens": [], "kept_mass": [], "finish_reasons": []}
    with torch.random.fork_rng(devices=[]), _plain_defaults(model.hf_model):
        for start in range(0, len(rows), request.max_batch):
            torch.manual_seed((request.params.seed * 1_000_003 + request.sample_ids[start]) % 2**63)
            batch = rows[start : start + request.max_batch]
            limits = [request.response_limit(start + i) for i in range(len(batch))]
            _generate_batch(model, batch, limits, request, result, streamer)
            if on_token is not None and streamer is None:
                for sample in range(start, start + len(batch)):
                    for token in result["tokens"][sample]:
                        on_token(sample, token)
            if request.on_progress is not None:
                drawn = sum(map(len, result["tokens"]))
                request.on_progress(len(result["tokens"]), len(rows), drawn)
    return {**result, "counters": {}}


def _generate_batch(
    model: ForeignCausalLM,
    rows: list[list[int]],
    limits: list[int],
    request: Request,
    result: dict[str, list[Any]],
    streamer: _Streamer | None,
) -> None:
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    options = _options(model, longest, max(limits), request.params, request.stop_tokens)
    hf_model: Any = model.hf_model
    output = hf_model.generate(input_ids=ids, attention_mask=mask, streamer=streamer, **options)
    mass = _kept_mass(output, request.params)
    for i, row in enumerate(output.sequences[:, longest:].tolist()):
        response = row[: limits[i]]
        ends = [place for place, token in enumerate(response) if token in request.stop_tokens]
        length = ends[0] + 1 if ends else len(response)
        result["tokens"].append(response[:length])
        result["kept_mass"].append(mass[i, :length].tolist())
        result["finish_reasons"].append("stop" if ends else "length")


@contextmanager
def _plain_defaults(hf_model: Any) -> Iterator[None]:
    """Sets the model's own generation config aside.

    A repetition penalty in it would change what is sampled, and not what is scored.
    """
    from transformers import GenerationConfig

    own, hf_model.generation_config = hf_model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        hf_model.generation_config = own


def _options(
    model: ForeignCausalLM,
    longest: int,
    max_new: int,
    params: SamplingParams,
    stop_tokens: list[int],
) -> dict[str, Any]:
    context = getattr(model.hf_model.config, "max_position_embeddings", longest + max_new)
    options: dict[str, Any] = {
        "max_new_tokens": min(max_new, context - longest),
        "do_sample": not params.greedy,
        "eos_token_id": stop_tokens or None,
        "pad_token_id": stop_tokens[0] if stop_tokens else 0,
        "return_dict_in_generate": True,
    }
    if not params.greedy:
        options |= {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p}
        if params.truncated:
            options |= {"output_scores": True, "output_logits": True}
    return options


def _kept_mass(output: Any, params: SamplingParams) -> Tensor:
    """Probability of the tokens that transformers' top-k and top-p left, ``[rows, steps]``."""
    if params.greedy or not params.truncated:
        return torch.ones_like(output.sequences, dtype=torch.float32)
    steps = [
        (logits / params.temperature).softmax(-1).masked_fill(scores.isneginf(), 0.0).sum(-1)
        for logits, scores in zip(output.logits, output.scores, strict=True)
    ]
    return torch.stack(steps, dim=1)
