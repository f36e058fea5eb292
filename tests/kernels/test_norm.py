"""What the operator walk does not see of the normalisation family."""

from __future__ import annotations

import pytest
import torch

from hybrid_kernels import ops, reference
from hybrid_kernels.nn import LayerNorm, RMSNorm
from hybrid_kernels.testing import assert_as_accurate, assert_same_bits

COLS = 577  # 36 vectors of 16 and one lane


def test_layer_norm_survives_a_large_mean() -> None:
    """E[x^2] - E[x]^2 would lose every digit of the variance here."""
    x = 1e4 + torch.randn(4, COLS)
    weight, bias = torch.randn(2, COLS)
    exact = reference.layer_norm(x.double(), weight.double(), bias.double(), 1e-5)
    plain = reference.layer_norm(x, weight, bias, 1e-5)
    assert_as_accurate(ops.layer_norm(x, weight, bias, 1e-5), exact, plain)


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_a_row_has_the_same_bits_in_any_batch(norm: str) -> None:
    """Prefill, decode and training see the same row among different neighbours."""
    x = torch.randn(40, COLS)
    weight = torch.randn(COLS)
    extra = () if norm == "rms_norm" else (torch.randn(COLS),)
    run = getattr(ops, norm)
    batch = run(x, weight, *extra, 1e-6)
    for row in (0, 17, 39):
        assert_same_bits(batch[row], run(x[row], weight, *extra, 1e-6))


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_residual_form_has_the_bits_of_add_then_norm(norm: str) -> None:
    x, residual = torch.randn(2, 7, COLS)
    weight = torch.randn(COLS)
    extra = () if norm == "rms_norm" else (torch.randn(COLS),)
    y, total = getattr(ops, f"add_{norm}")(x, residual, weight, *extra, 1e-6)
    assert_same_bits(total, x + residual)
    assert_same_bits(y, getattr(ops, norm)(total, weight, *extra, 1e-6))


def test_weight_gradient_of_many_rows_is_accurate() -> None:
    """Twenty thousand rows go through partial sums; one running float would drift."""
    x, grad = torch.randn(2, 20000, 16)
    weight = torch.ones(16, requires_grad=True)
    (actual,) = torch.autograd.grad(ops.rms_norm(x, weight, 1e-6), weight, grad)
    normed = reference.rms_norm(x.double(), torch.ones(16).double(), 1e-6)
    exact = (normed * grad.double()).sum(0)
    assert_as_accurate(actual, exact, (normed.float() * grad).sum(0), factor=3.0)


@pytest.mark.parametrize("output", [0, 1])
def test_residual_gradient_through_one_output_alone(output: int) -> None:
    x, residual = torch.randn(2, 5, 33).double()
    weight = torch.rand(33).double()

    def gradient(run, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, residual)]
        result = run(*leaves, weight.to(dtype), 1e-6)[output]
        return torch.autograd.grad(result.square().sum(), leaves)

    exact = gradient(reference.add_rms_norm, torch.float64)
    plain = gradient(reference.add_rms_norm, torch.float32)
    for triple in zip(gradient(ops.add_rms_norm, torch.float32), exact, plain, strict=True):
        assert_as_accurate(*triple)


def test_second_derivative_is_refused() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    y = ops.rms_norm(x, torch.ones(8), 1e-6)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_module(bias: bool) -> None:
    ours, peer = LayerNorm(40, eps=1e-3, bias=bias), torch.nn.LayerNorm(40, eps=1e-3, bias=bias)
    peer.load_state_dict(ours.state_dict())
    x = torch.randn(3, 40)
    torch.testing.assert_close(ours(x), peer(x))
    y, total = ours(x, x)
    torch.testing.assert_close(y, peer(x + x))
    torch.testing.assert_close(total, x + x, rtol=0, atol=0)


def test_rms_norm_module() -> None:
    ours, peer = RMSNorm(40, eps=1e-3), torch.nn.RMSNorm(40, eps=1e-3)
    peer.load_state_dict(ours.state_dict())
    x = torch.randn(3, 40)
    torch.testing.assert_close(ours(x), peer(x))
