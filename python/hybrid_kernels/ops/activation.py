"""Activations fused with a bias (GPT-2, OPT) or a gate (Llama: Shazeer, "GLU Variants", 2020).

Kinds: ``relu``; ``silu``, x sigmoid(x); ``gelu_erf``, x Phi(x) with the normal distribution Phi;
and ``gelu_tanh``, its approximation x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2 (Hendrycks
and Gimpel, "Gaussian Error Linear Units", 2016).

Where float32 stands below, CUDA tensors may also be float16 or bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybrid_kernels.ops._dispatch import register, use_native
from hybrid_kernels.reference import activation as reference


def bias_activation(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """``y = act(x + bias)`` in one pass.

    Args:
        x: ``[..., F]`` float32.
        bias: ``[F]`` float32 or None.
        kind: ``relu``, ``silu``, ``gelu_tanh`` or ``gelu_erf``.

    Returns:
        ``[..., F]`` float32. The backward recomputes from ``x`` and ``bias``.
    """
    if not use_native("bias_activation", x, bias):
        return reference.bias_activation(x, bias, kind)
    return torch.ops.hybrid_kernels.bias_activation(x, bias, kind)


def gated_activation(gate_up: Tensor, kind: str) -> Tensor:
    """``y = act(gate) * up`` in one pass; ``gate_up = [gate | up]`` along the last dimension.

    Args:
        gate_up: ``[..., 2F]`` float32.
        kind: ``relu``, ``silu``, ``gelu_tanh`` or ``gelu_erf``.

    Returns:
        ``[..., F]`` float32. The backward recomputes from ``gate_up``.
    """
    if not use_native("gated_activation", gate_up):
        return reference.gated_activation(gate_up, kind)
    return torch.ops.hybrid_kernels.gated_activation(gate_up, kind)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _bias_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.kind = inputs
    ctx.save_for_backward(x, bias)


def _bias_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = torch.ops.hybrid_kernels.bias_activation_backward(grad_y, x, bias, ctx.kind)
    return grad_x, None if bias is None else grad_bias, None


def _gated_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate_up, ctx.kind = inputs
    ctx.save_for_backward(gate_up)


def _gated_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    (gate_up,) = ctx.saved_tensors
    return torch.ops.hybrid_kernels.gated_activation_backward(grad_y, gate_up, ctx.kind), None


register(
    "bias_activation",
    lambda x, bias, kind: _like(x),
    setup_context=_bias_setup,
    backward=_bias_backward,
    half_on_cuda=True,
)
register(
    "bias_activation_backward",
    lambda grad_y, x, bias, kind: (_like(x), x.new_empty(0 if bias is None else x.shape[-1])),
)
register(
    "gated_activation",
    lambda gate_up, kind: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
    setup_context=_gated_setup,
    backward=_gated_backward,
    half_on_cuda=True,
)
register("gated_activation_backward", lambda grad_y, gate_up, kind: _like(gate_up))
