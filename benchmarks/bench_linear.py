"""The linear layer against torch's: ``pytest benchmarks/bench_linear.py --benchmark-only``.

Sizes are SmolLM2-135M's. Calls walk through copies of the weight that exceed the caches, as
the layers of a model do, so few rows are bound by reading memory. Bytes count each operand once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hybrid_kernels import ops

FLOAT = 4
COLD_BYTES = 80e6
LAYERS = {
    "gate_up": (1536, 576),
    "attn_out": (576, 576),
    "mlp_out": (576, 1536),
    "head": (49152, 576),
}
by_layer = pytest.mark.parametrize("layer", LAYERS)


def _weights(layer: str) -> Iterator[Tensor]:
    n, k = LAYERS[layer]
    copies = max(1, round(COLD_BYTES / (n * k * FLOAT)))
    return itertools.cycle(torch.randn(copies, n, k))


@by_layer
@pytest.mark.parametrize("rows", [1, 4, 8, 16, 32, 64, 256, 1024])
def bench_linear(bench: Callable[..., None], layer: str, rows: int) -> None:
    n, k = LAYERS[layer]
    if rows > 64 and layer == "head":
        pytest.skip("the head sees chunks of rows")
    x, weights = torch.randn(rows, k), _weights(layer)
    bench(
        lambda: ops.linear(x, next(weights)),
        bytes=(rows * k + n * k + rows * n) * FLOAT,
        flops=2 * rows * n * k,
        baseline=lambda: functional.linear(x, next(weights)),
    )


@by_layer
@pytest.mark.parametrize("rank", [8, 32])
def bench_linear_with_lora(bench: Callable[..., None], layer: str, rank: int) -> None:
    """The adapter unmerged, eight rows: its share of a decode step."""
    n, k = LAYERS[layer]
    x, weights = torch.randn(8, k), _weights(layer)
    lora_a, lora_b = torch.randn(rank, k), torch.randn(n, rank)
    bench(
        lambda: ops.linear(x, next(weights), None, lora_a, lora_b, 2.0),
        bytes=(8 * k + n * k + rank * (n + k) + 8 * n) * FLOAT,
        flops=2 * 8 * (n * k + rank * (n + k)),
        baseline=lambda: functional.linear(x, next(weights)) + 2.0 * (x @ lora_a.T @ lora_b.T),
    )


@pytest.mark.parametrize("layer", ["gate_up", "attn_out", "mlp_out"])
def bench_linear_training(bench: Callable[..., None], layer: str) -> None:
    """Forward and both gradients for 1,024 tokens."""
    n, k = LAYERS[layer]
    x, grad = torch.randn(1024, k, requires_grad=True), torch.randn(1024, n)
    weight = torch.randn(n, k, requires_grad=True)

    def step(linear: Callable[[Tensor, Tensor], Tensor]) -> None:
        torch.autograd.grad(linear(x, weight), (x, weight), grad)

    bench(
        lambda: step(ops.linear),
        bytes=3 * (1024 * k + n * k + 1024 * n) * FLOAT,
        flops=3 * 2 * 1024 * n * k,
        baseline=lambda: step(functional.linear),
        rounds=10,
    )
