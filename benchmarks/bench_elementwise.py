"""Norm and activation kernels against plain torch: ``pytest benchmarks/ --benchmark-only``.

Bytes count every operand once, as if the caches were perfect within an operator and useless between
two: a provider that passes over its data twice shows as a lower rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_kernels import ops, reference

PROVIDERS: dict[str, Any] = {"native": ops, "torch": reference}
SIZES = {"decode-8x576": (8, 576), "train-2048x576": (2048, 576), "train-2048x2048": (2048, 2048)}
FLOAT = 4

by_provider = pytest.mark.parametrize("provider", PROVIDERS)
by_size = pytest.mark.parametrize("size", SIZES)
by_kind = pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu_erf"])


def _rows(size: str, widths: int = 1) -> Tensor:
    rows, cols = SIZES[size]
    return torch.randn(rows, widths * cols)


@by_provider
@by_size
def bench_add_rms_norm(bench: Callable[..., None], provider: str, size: str) -> None:
    x, residual = _rows(size), _rows(size)
    weight = torch.randn(x.shape[1])
    run = PROVIDERS[provider].add_rms_norm
    bench(lambda: run(x, residual, weight, 1e-5), bytes=4 * x.numel() * FLOAT)


@by_provider
@by_size
def bench_layer_norm(bench: Callable[..., None], provider: str, size: str) -> None:
    x = _rows(size)
    weight, bias = torch.randn(2, x.shape[1])
    run = PROVIDERS[provider].layer_norm
    bench(lambda: run(x, weight, bias, 1e-5), bytes=2 * x.numel() * FLOAT)


@by_provider
@by_size
def bench_rms_norm_with_backward(bench: Callable[..., None], provider: str, size: str) -> None:
    x, grad = _rows(size).requires_grad_(), _rows(size)
    weight = torch.randn(x.shape[1], requires_grad=True)
    run = PROVIDERS[provider].rms_norm

    def step() -> None:
        torch.autograd.grad(run(x, weight, 1e-5), (x, weight), grad)

    bench(step, bytes=5 * x.numel() * FLOAT)


@by_provider
@by_size
@by_kind
def bench_gated_activation(bench: Callable[..., None], provider: str, size: str, kind: str) -> None:
    gate_up = _rows(size, widths=2)
    run = PROVIDERS[provider].gated_activation
    bench(lambda: run(gate_up, kind), bytes=gate_up.numel() * 3 // 2 * FLOAT)


@by_provider
@by_size
@by_kind
def bench_bias_activation(bench: Callable[..., None], provider: str, size: str, kind: str) -> None:
    x = _rows(size)
    bias = torch.randn(x.shape[1])
    run = PROVIDERS[provider].bias_activation
    bench(lambda: run(x, bias, kind), bytes=2 * x.numel() * FLOAT)
