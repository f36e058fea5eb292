"""RLHF statistics, losses and LoRA merging against plain torch: ``pytest benchmarks/``.

Bytes count every operand once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_kernels import ops, reference

PROVIDERS: dict[str, Any] = {"native": ops, "torch": reference}
BATCH, STEPS = 64, 512
FLOAT = 4

by_provider = pytest.mark.parametrize("provider", PROVIDERS)


def _tokens(count: int) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    return tuple(torch.randn(BATCH, STEPS, generator=rng) for _ in range(count))


def _mask() -> Tensor:
    return torch.rand(BATCH, STEPS, generator=torch.Generator().manual_seed(1)) < 0.7


@by_provider
def bench_gae(bench: Callable[..., None], provider: str) -> None:
    rewards, values = _tokens(2)
    lengths, run = torch.full((BATCH,), STEPS), PROVIDERS[provider].gae
    bench(lambda: run(rewards, values, lengths, 1.0, 0.95), bytes=4 * rewards.numel() * FLOAT)


@by_provider
def bench_whiten(bench: Callable[..., None], provider: str) -> None:
    (x,), mask = _tokens(1), _mask()
    run = PROVIDERS[provider]
    bench(
        lambda: run.masked_whiten(x, mask, run.masked_moments(x, mask), True),
        bytes=2 * x.numel() * FLOAT + mask.numel(),
    )


@by_provider
def bench_ppo_policy_loss(bench: Callable[..., None], provider: str) -> None:
    (new, old, advantages), mask = _tokens(3), _mask()
    new = (old + 0.1 * new).requires_grad_()
    run = PROVIDERS[provider].ppo_policy_loss

    def step() -> None:
        torch.autograd.grad(run(new, old, advantages, mask, 0.2, 0.28, 0.0)[0], new)

    bench(step, bytes=4 * new.numel() * FLOAT + mask.numel())


@by_provider
def bench_ppo_value_loss(bench: Callable[..., None], provider: str) -> None:
    (values, old, returns), mask = _tokens(3), _mask()
    values.requires_grad_()
    run = PROVIDERS[provider].ppo_value_loss

    def step() -> None:
        torch.autograd.grad(run(values, old, returns, mask, 0.2)[0], values)

    bench(step, bytes=4 * values.numel() * FLOAT + mask.numel())


@by_provider
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def bench_lora_merge(bench: Callable[..., None], provider: str, dtype: torch.dtype) -> None:
    outputs, inputs, rank = 3072, 576, 16
    weight = torch.randn(outputs, inputs).to(dtype)
    lora_a, lora_b = torch.randn(2 * rank, inputs), torch.randn(outputs, rank)
    run, splits = PROVIDERS[provider].lora_merge, [outputs // 2] * 2
    bench(
        lambda: run(weight, lora_a, lora_b, 0.1, splits),
        bytes=2 * weight.numel() * weight.element_size(),
        flops=2 * weight.numel() * rank,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def bench_lora_merge_and_unmerge_in_place(bench: Callable[..., None], dtype: torch.dtype) -> None:
    outputs, inputs, rank = 3072, 576, 16
    weight = torch.randn(outputs, inputs).to(dtype)
    factors = (torch.randn(rank, inputs), torch.randn(outputs, rank), 0.001, [outputs])

    def cycle() -> None:
        ops.lora_unmerge_(weight, *factors, ops.lora_merge_(weight, *factors))

    bench(cycle, bytes=4 * weight.numel() * weight.element_size() + 2 * weight.numel())
