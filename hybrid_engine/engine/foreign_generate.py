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
    """Tokens, finish reasons, kept mass and thresholds, one entry a sample.

    ``on_token`` gets a lone sample's tokens as they are drawn, those of several when their batch is
    done: transformers streams single sequences only.
    """
    rows, on_token = request.rows, request.on_token
    streamer = _Streamer(on_token) if on_token is not None and len(rows) == 1 else None
    columns = ("tokens", "kept_mass", "thresholds", "finish_reasons")
    result: dict[str, list[Any]] = {name: [] for name in columns}
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
    mass, thresholds = _kept_sets(output, request.params)
    for i, row in enumerate(output.sequences[:, longest:].tolist()):
        response = row[: limits[i]]
        ends = [place for place, token in enumerate(response) if token in request.stop_tokens]
        length = ends[0] + 1 if ends else len(response)
        result["tokens"].append(response[:length])
        result["kept_mass"].append(mass[i, :length].tolist())
        result["thresholds"].append(thresholds[i, :length].tolist())
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


def _kept_sets(output: Any, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Of the tokens that transformers' top-k and top-p left: their probability and the logit that
    parts them from the others, each ``[rows, steps]``.

    The logit lies halfway between the two sets: scored in another batch shape, the logits differ in
    their last bits, and the sets should not.
    """
    if params.greedy or not params.truncated:
        mass = torch.ones_like(output.sequences, dtype=torch.float32)
        return mass, torch.full_like(mass, float("-inf"))
    mass_steps, threshold_steps = [], []
    for logits, scores in zip(output.logits, output.scores, strict=True):
        cut = scores.isneginf()
        probabilities = (logits / params.temperature).softmax(-1)
        mass_steps.append(probabilities.masked_fill(cut, 0.0).sum(-1))
        least_kept = logits.masked_fill(cut, float("inf")).amin(-1)
        most_cut = logits.masked_fill(~cut, float("-inf")).amax(-1)
        threshold_steps.append((least_kept + most_cut) / 2)  # -inf where nothing is cut
    return torch.stack(mass_steps, dim=1), torch.stack(threshold_steps, dim=1)
