"""Attention against torch: ``pytest benchmarks/bench_attention.py --benchmark-only``.

Heads are SmolLM2-135M's (9 over 3, of 64). Flops count the causal half; bytes each operand once.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hybrid_kernels import ops

FLOAT = 4
HEADS, KV_HEADS, DIM = 9, 3, 64
BLOCK = 64
by_length = pytest.mark.parametrize("batch, length", [(32, 64), (8, 256), (4, 512), (1, 2048)])


def _packed(batch: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = torch.randn(batch * length, HEADS, DIM)
    k, v = torch.randn(2, batch * length, KV_HEADS, DIM)
    return q, k, v, torch.arange(0, batch * length + 1, length, dtype=torch.int32)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, batch: int) -> Tensor:
    q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@by_length
def bench_attention(bench: Callable[..., None], batch: int, length: int) -> None:
    q, k, v, cu_seqlens = _packed(batch, length)
    bench(
        lambda: ops.attention(q, k, v, cu_seqlens, DIM**-0.5),
        bytes=2 * (q.numel() + k.numel()) * FLOAT,
        flops=2 * batch * length**2 * HEADS * DIM,
        baseline=lambda: _sdpa(q, k, v, batch),
    )


@by_length
def bench_attention_training(bench: Callable[..., None], batch: int, length: int) -> None:
    """Forward and backward: two products and five."""
    q, k, v, cu_seqlens = _packed(batch, length)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(q)
    grad_sdpa = grad.unflatten(0, (batch, -1)).transpose(1, 2).contiguous()

    def ours() -> None:
        torch.autograd.grad(ops.attention(q, k, v, cu_seqlens, DIM**-0.5), leaves, grad)

    def torchs() -> None:
        torch.autograd.grad(_sdpa(q, k, v, batch), leaves, grad_sdpa)

    bench(ours, flops=7 * batch * length**2 * HEADS * DIM, baseline=torchs, rounds=10)


@pytest.mark.parametrize("batch, length", [(1, 128), (8, 128), (32, 128), (64, 128), (8, 1024)])
def bench_paged_decode(bench: Callable[..., None], batch: int, length: int) -> None:
    """One new token a sequence, against torch on a dense cache of the same lengths."""
    blocks = -(-length // BLOCK)
    cache = torch.randn(batch * blocks, KV_HEADS, 2, BLOCK, DIM)
    tables = torch.randperm(batch * blocks).int().view(batch, blocks)
    q = torch.randn(batch, HEADS, DIM)
    lengths = torch.full((batch,), length, dtype=torch.int32)
    cu_q = torch.arange(batch + 1, dtype=torch.int32)
    keys, values = torch.randn(2, batch, KV_HEADS, length, DIM)
    bench(
        lambda: ops.paged_attention(q, cache, tables, lengths, cu_q, DIM**-0.5),
        bytes=2 * keys.numel() * FLOAT,
        flops=4 * batch * length * HEADS * DIM,
        baseline=lambda: functional.scaled_dot_product_attention(
            q[:, :, None], keys, values, enable_gqa=True
        ),
    )
