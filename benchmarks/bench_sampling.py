"""Sampling and scoring kernels against plain torch: ``pytest benchmarks/ --benchmark-only``.

Bytes count the logits once (and their gradient once), as if a row stayed in the cache between
passes: a provider that writes the softmax out shows as a lower rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_kernels import ops, reference

VOCAB = 49152  # SmolLM2
FLOAT = 4
TRUNCATIONS = {"all": (0, 1.0), "top-k-50": (50, 1.0), "top-p-0.9": (0, 0.9), "both": (50, 0.9)}
PROVIDERS: dict[str, Any] = {"native": ops, "torch": reference}

by_provider = pytest.mark.parametrize("provider", PROVIDERS)


def _logits(rows: int) -> Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0))


def _torch_sample(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """The usual expression: a token and its log-probability under the whole distribution."""
    log_p = logits.log_softmax(-1)
    threshold = reference.kept_threshold(logits, 1.0, top_k, top_p)
    kept = log_p.masked_fill(logits < threshold.unsqueeze(-1), float("-inf"))
    token = torch.multinomial(kept.exp(), 1)
    return token, log_p.gather(-1, token)


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("rows", [1, 64])
def bench_sample(bench: Callable[..., None], rows: int, truncation: str) -> None:
    """``speedup`` is over softmax, sort or topk, and multinomial."""
    logits, (top_k, top_p) = _logits(rows), TRUNCATIONS[truncation]
    ids, positions = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    bench(
        lambda: ops.sample(logits, 1.0, top_k, top_p, 0, ids, positions),
        bytes=logits.numel() * FLOAT,
        baseline=lambda: _torch_sample(logits, top_k, top_p),
        rounds=10,
    )


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("rows", [1, 8, 64])
def bench_linear_sample(bench: Callable[..., None], rows: int, truncation: str) -> None:
    """The head and the draw together; ``speedup`` is over torch's head, softmax and multinomial."""
    width, (top_k, top_p) = 576, TRUNCATIONS[truncation]
    hidden = 3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(VOCAB, width, generator=torch.Generator().manual_seed(1)) / width**0.5
    ids, positions = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    bench(
        lambda: ops.linear_sample(hidden, weight, 1.0, top_k, top_p, 0, ids, positions),
        bytes=weight.numel() * FLOAT,
        flops=2 * rows * weight.numel(),
        baseline=lambda: _torch_sample(torch.nn.functional.linear(hidden, weight), top_k, top_p),
        rounds=10,
    )


@by_provider
def bench_token_logprobs(bench: Callable[..., None], provider: str) -> None:
    logits, targets = _logits(256), torch.arange(256)
    run = PROVIDERS[provider].token_logprobs
    bench(lambda: run(logits, targets, 1.0), bytes=logits.numel() * FLOAT, rounds=10)


@by_provider
def bench_token_logprobs_with_backward(bench: Callable[..., None], provider: str) -> None:
    logits, targets = _logits(256).requires_grad_(), torch.arange(256)
    run, grads = PROVIDERS[provider].token_logprobs, torch.ones(2, 256)

    def step() -> None:
        torch.autograd.grad(run(logits, targets, 1.0), logits, tuple(grads))

    bench(step, bytes=3 * logits.numel() * FLOAT, rounds=10)


@pytest.mark.parametrize("trained_head", [False, True], ids=["frozen-head", "trained-head"])
def bench_linear_token_logprobs(bench: Callable[..., None], trained_head: bool) -> None:
    """Forward and backward of the chunked head; ``speedup`` is over torch with all logits alive."""
    rows, width = 512, 576
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = (torch.randn(VOCAB, width) / width**0.5).requires_grad_(trained_head)
    targets, grads = torch.arange(rows), tuple(torch.ones(2, rows))
    wanted = [hidden, weight] if trained_head else [hidden]

    def chunked() -> None:
        torch.autograd.grad(ops.linear_token_logprobs(hidden, weight, targets), wanted, grads)

    def whole() -> None:
        logits = torch.nn.functional.linear(hidden, weight)
        torch.autograd.grad(reference.token_logprobs(logits, targets, 1.0), wanted, grads)

    products = 4 if trained_head else 3  # the logits twice, and one product a gradient
    flops = products * 2 * rows * width * VOCAB
    bench(chunked, flops=flops, baseline=whole, rounds=3)
