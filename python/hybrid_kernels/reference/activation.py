"""Activations in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_FUNCTIONS = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_erf": F.gelu,
}


def activation(x: Tensor, kind: str) -> Tensor:
    """``kind`` of ``x``, elementwise; ValueError for an unknown kind."""
    if kind not in _FUNCTIONS:
        raise ValueError(f"activation kind is {kind!r}; expected relu, silu, gelu_tanh or gelu_erf")
    return _FUNCTIONS[kind](x)


def bias_activation(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """``act(x + bias)``."""
    return activation(x if bias is None else x + bias, kind)


def activate(wide: Tensor, kind: str, gated: bool) -> Tensor:
    """Either of the two below, without a bias."""
    return gated_activation(wide, kind) if gated else bias_activation(wide, None, kind)


def gated_activation(gate_up: Tensor, kind: str) -> Tensor:
    """``act(gate) * up`` for ``gate_up = [gate | up]`` along the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate, kind) * up
