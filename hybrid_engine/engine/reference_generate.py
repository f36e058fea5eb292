"""Generation by recomputing every sequence for every token: slow, short, and without a cache.

It serves where there is no compiler for the native library, and as the oracle of its tests: the
same arguments give the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hybrid_engine.engine.request import Request
from hybrid_engine.engine.rollout import TOKEN_COLUMNS
from hybrid_engine.engine.sampling import SamplingParams
from hybrid_engine.models import CausalLM, last_rows, pack
from hybrid_kernels import ops


@dataclass
class _Sample:
    place: int  # in the result
    prompt: list[int]
    sample_id: int
    limit: int  # longest response
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    kept_mass: list[float] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)
    kept_logprobs: list[float] = field(default_factory=list)
    reason: str = ""


@torch.no_grad()
def reference_generate(model: CausalLM, request: Request) -> dict[str, Any]:
    """Same results as `NativeGenerator`, one list a sample. Drafts would change none."""
    rows = request.rows
    room = [model.spec.max_positions - len(prompt) for prompt in rows]
    samples = [
        _Sample(i, prompt, request.sample_ids[i], min(request.response_limit(i), room[i]))
        for i, prompt in enumerate(rows)
    ]
    try:
        _generate(model, samples, request)
    except BaseException as error:
        error.partial = _columns(samples)  # type: ignore[attr-defined]
        raise
    return _columns(samples)


def _generate(model: CausalLM, samples: list[_Sample], request: Request) -> None:
    waiting, live, drawn = list(reversed(samples)), list[_Sample](), 0
    while waiting or live:
        while waiting and len(live) < request.max_batch:
            live.append(waiting.pop())
        _append(live, _draw(model, live, request.params), frozenset(request.stop_tokens))
        drawn += len(live)
        if request.on_token is not None:
            for sample in live:
                request.on_token(sample.place, sample.tokens[-1])
        live = [sample for sample in live if not sample.reason]
        if request.on_progress is not None:
            request.on_progress(len(samples) - len(waiting) - len(live), len(samples), drawn)


def _columns(samples: list[_Sample]) -> dict[str, Any]:
    result: dict[str, Any] = {name: [getattr(s, name) for s in samples] for name in TOKEN_COLUMNS}
    return {**result, "finish_reasons": [s.reason for s in samples], "counters": {}}


def _draw(model: CausalLM, live: list[_Sample], params: SamplingParams) -> Any:
    batch = pack([sample.prompt + sample.tokens for sample in live]).to(model.device)
    hidden = model.decoder(batch, rows=last_rows(batch))
    (logits,) = model.head(hidden)
    return ops.sample(
        logits,
        params.temperature,
        params.top_k,
        params.top_p,
        params.seed,
        _int64([sample.sample_id for sample in live]).to(model.device),
        _int64([len(sample.tokens) for sample in live]).to(model.device),
    )


def _append(live: list[_Sample], drawn: Any, stop_tokens: frozenset[int]) -> None:
    for sample, *values in zip(live, *(column.tolist() for column in drawn), strict=True):
        for name, value in zip(TOKEN_COLUMNS, values, strict=True):
            getattr(sample, name).append(value)
        if sample.tokens[-1] in stop_tokens:
            sample.reason = "stop"
        elif len(sample.tokens) == sample.limit:
            sample.reason = "length"


def _int64(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
