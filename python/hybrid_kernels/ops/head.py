"""The language-model head and the scores of its tokens, without the logits of a whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybrid_kernels.ops.linear import linear, matmul
from hybrid_kernels.ops.sampling import token_logprobs


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunk_rows: int = 256,
) -> tuple[Tensor, Tensor]:
    """:func:`token_logprobs` of ``hidden @ weight.T``, ``chunk_rows`` rows of logits at a time.

    The same bits as ``token_logprobs(linear(hidden, weight), targets, temperature)``, since every
    row of logits depends on its own row of ``hidden`` alone. The backward computes each chunk's
    logits again, so at most ``2 * chunk_rows * V`` floats of logits and gradients are alive;
    ``grad_weight`` is formed only if required.

    Args:
        hidden: ``[N, h]`` float32.
        weight: ``[V, h]`` float32, the head or the tied embedding.
        targets: ``[N]`` int64 in [0, V).
        temperature: finite, at least 1e-6.
        chunk_rows: at least 1.

    Returns:
        ``(logprob, entropy)``, each ``[N]`` float32.

    Raises:
        ValueError: wrong shapes or dtypes, a target outside the vocabulary, a bad temperature or
            chunk.
    """
    if chunk_rows < 1:
        raise ValueError(f"linear_token_logprobs: chunk_rows is {chunk_rows}; expected at least 1")
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"linear_token_logprobs: targets has shape {list(targets.shape)}; "
            f"expected {list(hidden.shape[:-1])} (from hidden)"
        )
    return _HeadLogprobs.apply(hidden, weight, targets, temperature, chunk_rows)


class _HeadLogprobs(torch.autograd.Function):
    """Chunks over rows; saves the inputs only."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        logprob, entropy = hidden.new_empty(targets.shape), hidden.new_empty(targets.shape)
        for rows in _chunks(len(targets), chunk_rows):
            logits = linear(hidden[rows], weight)
            logprob[rows], entropy[rows] = token_logprobs(logits, targets[rows], temperature)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        for rows in _chunks(len(targets), ctx.chunk_rows):
            logits = linear(hidden[rows], weight).requires_grad_()
            with torch.enable_grad():
                scores = token_logprobs(logits, targets[rows], ctx.temperature)
            grads = (grad_logprob[rows], grad_entropy[rows])
            (grad_logits,) = torch.autograd.grad(scores, logits, grads)
            if grad_hidden is not None:
                grad_hidden[rows] = matmul(grad_logits, weight)
            if grad_weight is not None:
                grad_weight += matmul(grad_logits.T, hidden[rows])
        return grad_hidden, grad_weight, None, None, None


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
