"""What the operator walk does not see of the activation family."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from transformers.activations import ACT2FN

from hybrid_kernels import ops, reference
from hybrid_kernels.ops import _dispatch
from hybrid_kernels.testing import assert_same_bits

PEERS = {"relu": "relu", "silu": "silu", "gelu_tanh": "gelu_new", "gelu_erf": "gelu"}
INFINITY = math.inf

by_kind = pytest.mark.parametrize("kind", PEERS)


@by_kind
def test_kinds_are_those_of_transformers(kind: str) -> None:
    """An absolute bound: a few roundings of values up to 12, whatever formula the peer rounds."""
    x = torch.linspace(-12, 12, 4001)
    peer = ACT2FN[PEERS[kind]](x.double())
    assert (ops.bias_activation(x, None, kind).double() - peer).abs().max() < 2e-6


@by_kind
def test_far_values_and_slopes_stay_finite(kind: str) -> None:
    """x^3 overflows long before the function or its slope does."""
    x = torch.tensor([-3e38, -1e20, -50.0, 50.0, 1e20, 3e38], requires_grad=True)
    y = ops.bias_activation(x, None, kind)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, x.clamp_min(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slope, (x > 0).float(), rtol=1e-6, atol=1e-6)


@by_kind
def test_nan_passes_through(kind: str) -> None:
    x = torch.tensor([1.0, math.nan, INFINITY])
    y = ops.bias_activation(x, None, kind)
    assert y.isnan().tolist() == [False, True, False]
    assert y[2] == INFINITY


@by_kind
def test_gate_has_the_bits_of_the_activation_alone(kind: str) -> None:
    gate, up = torch.randn(2, 9, 77)
    fused = ops.gated_activation(torch.cat([gate, up], dim=-1), kind)
    assert_same_bits(fused, ops.bias_activation(gate, None, kind) * up)


def test_unknown_kind_is_refused_by_the_reference_too() -> None:
    with pytest.raises(ValueError, match="'swish'; expected relu, silu, gelu_tanh or gelu_erf"):
        reference.bias_activation(torch.ones(2), None, "swish")


def test_fallback_warns_once_for_each_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_KERNELS_REQUIRE_NATIVE", "0")
    _dispatch._warn_once.cache_clear()
    x = torch.randn(2, 4, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ops.gated_activation(x, "silu")
        ops.gated_activation(x, "silu")
    assert [str(warning.message).split(";")[0] for warning in caught] == [
        "hybrid_kernels.gated_activation: no native kernel for torch.float64 on cpu"
    ]


def test_fallback_is_an_error_where_native_is_required() -> None:
    x = torch.randn(2, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="no native kernel for torch.float64 on cpu"):
        ops.gated_activation(x, "silu")
