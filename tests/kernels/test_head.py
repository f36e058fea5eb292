"""The chunked head: bits of the unchunked one, its gradients, no logits of the whole batch."""

from __future__ import annotations

import pytest
import torch

from hybrid_kernels.ops.head import linear_token_logprobs
from hybrid_kernels.ops.linear import linear
from hybrid_kernels.ops.sampling import token_logprobs
from hybrid_kernels.reference import sampling as reference
from hybrid_kernels.testing import assert_as_accurate, assert_same_bits

ROWS, WIDTH, VOCAB, TEMPERATURE = 37, 48, 301, 0.8


def _problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=rng)
    weight = torch.randn(VOCAB, WIDTH, generator=rng) / 4
    return hidden, weight, torch.randint(VOCAB, (ROWS,), generator=rng)


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 38, 1000])
def test_chunks_change_no_bit(chunk: int) -> None:
    hidden, weight, targets = _problem()
    whole = token_logprobs(linear(hidden, weight), targets, TEMPERATURE)
    assert_same_bits(linear_token_logprobs(hidden, weight, targets, TEMPERATURE, chunk), whole)


@pytest.mark.parametrize("chunk", [7, 64])
def test_gradients(chunk: int) -> None:
    hidden, weight, targets = _problem()
    rng = torch.Generator().manual_seed(1)
    grads = [torch.randn(ROWS, generator=rng) for _ in range(2)]

    def gradients(score, dtype=torch.float32):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        return torch.autograd.grad(score(*leaves), leaves, [g.to(dtype) for g in grads])

    def plain(h, w):
        return reference.token_logprobs(h @ w.T, targets, TEMPERATURE)

    actual = gradients(lambda h, w: linear_token_logprobs(h, w, targets, TEMPERATURE, chunk))
    exact = gradients(plain, torch.float64)
    for got, want, ordinary in zip(actual, exact, gradients(plain), strict=True):
        assert_as_accurate(got, want, ordinary, factor=2.0)


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_wanted_gradients_are_formed(wanted: int) -> None:
    leaves = list(_problem())
    leaves[wanted].requires_grad_()
    linear_token_logprobs(*leaves)[0].sum().backward()
    assert leaves[wanted].grad is not None
    assert leaves[1 - wanted].grad is None


def test_nothing_as_large_as_the_logits_is_kept() -> None:
    hidden, weight, targets = (t.repeat(40, *[1] * (t.dim() - 1)) for t in _problem())
    hidden.requires_grad_()
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_token_logprobs(hidden, weight, targets, chunk_rows=16)
    assert sum(kept) == hidden.numel() + weight.numel() + targets.numel()
