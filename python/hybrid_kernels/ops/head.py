"""The language-model head, scored or drawn from without its logits.

On CUDA, tensors may also be float16 or bfloat16; the logits of up to 256 rows (scoring:
``chunk_rows``) exist at a time, in that dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hybrid_kernels.ops._dispatch import register, use_native_with_weight, widened
from hybrid_kernels.ops._exact import exact
from hybrid_kernels.ops.linear import linear, logits_of, matmul
from hybrid_kernels.ops.sampling import Sample, sample, token_logprobs
from hybrid_kernels.reference import sampling as reference


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    thresholds: Tensor | None = None,
    chunk_rows: int = 256,
) -> tuple[Tensor, Tensor]:
    """:func:`token_logprobs` of ``hidden @ weight.T``, whose logits never exist as a whole.

    The same bits as ``token_logprobs(linear(hidden, weight), targets, temperature, thresholds)``.
    The forward reduces a tile of the vocabulary while it is in the cache. The backward computes the
    logits of ``chunk_rows`` rows again, so at most ``2 * chunk_rows * V`` floats of logits and
    gradients are alive; ``grad_weight`` is formed only if required.

    Args:
        hidden: ``[N, h]`` float32.
        weight: ``[V, h]`` float32 or bfloat16 (see :func:`linear`): head or tied embedding.
        targets: ``[N]`` int64 in [0, V).
        temperature: finite, at least 1e-6.
        thresholds: ``[N]`` float32 or None, as in :func:`token_logprobs`.
        chunk_rows: at least 1.

    Returns:
        ``(logprob, entropy)``, each ``[N]`` float32.

    Raises:
        ValueError: wrong shapes or dtypes, a target outside the vocabulary, a bad temperature or
            chunk.
    """
    if chunk_rows < 1:
        raise ValueError(f"linear_token_logprobs: chunk_rows is {chunk_rows}; expected at least 1")
    if exact(hidden):
        return _chunked(_exact_scores, hidden, weight, targets, temperature, thresholds, chunk_rows)
    if use_native_with_weight("linear_token_logprobs", hidden, weight):
        logprob, entropy, _, _ = torch.ops.hybrid_kernels.linear_token_logprobs(
            hidden, weight, targets, temperature, thresholds, chunk_rows
        )
        return logprob, entropy
    weight = widened(weight, hidden)
    return _chunked(_plain_scores, hidden, weight, targets, temperature, thresholds, chunk_rows)


def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    sample_ids: Tensor,
    positions: Tensor,
) -> Sample:
    """:func:`sample` of ``hidden @ weight.T``, bit for bit, without its logits.

    Tiles of the vocabulary are reduced while they are in the cache; the blocks of 64 logits in
    which tokens are chosen are computed again, in groups of a bounded size.

    Args:
        hidden: ``[N, h]`` float32.
        weight: ``[V, h]`` float32 or bfloat16, as in :func:`linear`.
        temperature, top_k, top_p, seed, sample_ids, positions: as in :func:`sample`.

    Raises:
        ValueError: as :func:`sample`.
    """
    rule = (temperature, top_k, top_p, seed, sample_ids, positions)
    if exact(hidden):
        return sample(logits_of(hidden, weight), *rule)
    if not use_native_with_weight("linear_sample", hidden, weight):
        weight = widened(weight, hidden)
        return Sample(*reference.sample(hidden @ weight.T, *rule))
    return Sample(*torch.ops.hybrid_kernels.linear_sample(hidden, weight, *rule))


def _plain_scores(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return reference.token_logprobs(hidden @ weight.T, *rest)


def _exact_scores(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return token_logprobs(logits_of(hidden, weight), *rest)


def _chunked(
    scores: Callable[..., Any],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    thresholds: Tensor | None,
    chunk_rows: int,
) -> tuple[Tensor, Tensor]:
    def score(hidden: Tensor, targets: Tensor, thresholds: Tensor | None) -> Any:
        return scores(hidden, weight, targets, temperature, thresholds)

    if not len(targets):
        return score(hidden, targets, thresholds)
    parts = [
        checkpoint(
            score,
            hidden[rows],
            targets[rows],
            None if thresholds is None else thresholds[rows],
            use_reentrant=False,
        )
        for rows in _chunks(len(targets), chunk_rows)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, temperature, _, chunk_rows = inputs
    _, entropy, lse, threshold = output
    ctx.mark_non_differentiable(lse, threshold)
    ctx.save_for_backward(hidden, weight, targets, entropy, lse, threshold)
    ctx.temperature, ctx.chunk_rows = temperature, chunk_rows


def _backward(
    ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    hidden, weight, *rest = ctx.saved_tensors
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    grad_hidden = torch.empty_like(hidden) if needs_hidden else None
    grad_weight = torch.zeros_like(weight) if needs_weight and not len(hidden) else None
    for rows in _chunks(len(hidden), ctx.chunk_rows):
        grad_logits = torch.ops.hybrid_kernels.token_logprobs_backward(
            grad_logprob[rows],
            grad_entropy[rows],
            linear(hidden[rows], weight),
            *(saved[rows] for saved in rest),
            ctx.temperature,
        )
        if grad_hidden is not None:
            grad_hidden[rows] = matmul(grad_logits, weight)
        if needs_weight:
            part = matmul(grad_logits.T, hidden[rows]).float()  # 16-bit chunks add up in float32
            grad_weight = part if grad_weight is None else grad_weight.add_(part)
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype)
    return grad_hidden, grad_weight, None, None, None, None


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _row(hidden: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[:1], dtype=torch.float32)


register(
    "linear_token_logprobs",
    lambda hidden, weight, targets, temperature, thresholds, chunk_rows: (
        _row(hidden),
        _row(hidden),
        _row(hidden).double(),
        _row(hidden),
    ),
    setup_context=_setup,
    backward=_backward,
    half_on_cuda=True,
)
register(
    "linear_sample",
    lambda hidden, weight, temperature, top_k, top_p, seed, sample_ids, positions: (
        sample_ids.new_empty(hidden.shape[:1]),
        *(_row(hidden) for _ in range(5)),
    ),
    half_on_cuda=True,
)
