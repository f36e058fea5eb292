"""RMSNorm and LayerNorm, plain or fused with the residual add before them.

RMSNorm: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019. LayerNorm: Ba, Kiros and
Hinton, "Layer Normalization", 2016.

Where float32 stands below, CUDA tensors may also be float16 or bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybrid_kernels.ops._dispatch import register, use_native, widened
from hybrid_kernels.reference import norm as reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension: ``y = x * weight / sqrt(mean(x^2) + eps)``.

    Args:
        x: ``[..., N]`` float32.
        weight: ``[N]`` float32, or bfloat16, which is widened.
        eps: added to the mean square.

    Returns:
        ``[..., N]`` float32. Statistics are float32; the backward recomputes from ``x``.
    """
    weight = widened(weight, x)
    if not use_native("rms_norm", x, weight):
        return reference.rms_norm(x, weight, eps)
    y, _ = torch.ops.hybrid_kernels.rms_norm(x, weight, eps)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of ``x + residual``, and that sum, in one pass.

    Args:
        x: ``[..., N]`` float32.
        residual: like ``x``.
        weight: ``[N]`` float32, or bfloat16, which is widened.
        eps: added to the mean square.

    Returns:
        ``(y, sum)``, both ``[..., N]`` float32 in fresh storage.
    """
    weight = widened(weight, x)
    if not use_native("add_rms_norm", x, residual, weight):
        return reference.add_rms_norm(x, residual, weight, eps)
    y, total, _ = torch.ops.hybrid_kernels.add_rms_norm(x, residual, weight, eps)
    return y, total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension: ``y = (x - mean) * rstd * weight + bias``.

    Args:
        x: ``[..., N]`` float32.
        weight: ``[N]`` float32, or bfloat16, which is widened.
        bias: like ``weight``, or None.
        eps: added to the (biased) variance.

    Returns:
        ``[..., N]`` float32. The variance is computed after the mean, from the deviations.
    """
    weight, bias = widened(weight, x), widened(bias, x)
    if not use_native("layer_norm", x, weight, bias):
        return reference.layer_norm(x, weight, bias, eps)
    y, _, _ = torch.ops.hybrid_kernels.layer_norm(x, weight, bias, eps)
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`layer_norm` of ``x + residual``, and that sum, in one pass.

    Args:
        x: ``[..., N]`` float32.
        residual: like ``x``.
        weight: ``[N]`` float32, or bfloat16, which is widened.
        bias: like ``weight``, or None.
        eps: added to the (biased) variance.

    Returns:
        ``(y, sum)``, both ``[..., N]`` float32 in fresh storage.
    """
    weight, bias = widened(weight, x), widened(bias, x)
    if not use_native("add_layer_norm", x, residual, weight, bias):
        return reference.add_layer_norm(x, residual, weight, bias, eps)
    y, total, _, _ = torch.ops.hybrid_kernels.add_layer_norm(x, residual, weight, bias, eps)
    return y, total


# What torch must know. A saved tensor is an input or an output, so nothing is kept twice.


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _row_statistic(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


def _rms_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _ = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(x, weight, rstd)


def _rms_backward(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight = torch.ops.hybrid_kernels.rms_norm_backward(grad_y, *ctx.saved_tensors)
    return grad_x, grad_weight, None


def _add_rms_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, _ = inputs
    _, total, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(total, weight, rstd)


def _add_rms_backward(
    ctx: Any, grad_y: Tensor, grad_sum: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    grad, grad_weight = torch.ops.hybrid_kernels.rms_norm_backward(grad_y, *ctx.saved_tensors)
    grad = grad + grad_sum
    return grad, grad, grad_weight, None


def _layer_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.has_bias = bias is not None


def _layer_backward(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight, grad_bias = torch.ops.hybrid_kernels.layer_norm_backward(
        grad_y, *ctx.saved_tensors
    )
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None


def _add_layer_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, bias, _ = inputs
    _, total, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(total, weight, mean, rstd)
    ctx.has_bias = bias is not None


def _add_layer_backward(
    ctx: Any, grad_y: Tensor, grad_sum: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    grad, grad_weight, grad_bias = torch.ops.hybrid_kernels.layer_norm_backward(
        grad_y, *ctx.saved_tensors
    )
    grad = grad + grad_sum
    return grad, grad, grad_weight, grad_bias if ctx.has_bias else None, None


register(
    "rms_norm",
    lambda x, weight, eps: (_like(x), _row_statistic(x)),
    setup_context=_rms_setup,
    backward=_rms_backward,
    half_on_cuda=True,
)
register(
    "add_rms_norm",
    lambda x, residual, weight, eps: (_like(x), _like(x), _row_statistic(x)),
    setup_context=_add_rms_setup,
    backward=_add_rms_backward,
    half_on_cuda=True,
)
register("rms_norm_backward", lambda grad_y, x, weight, rstd: (_like(x), _like(weight)))
register(
    "layer_norm",
    lambda x, weight, bias, eps: (_like(x), _row_statistic(x), _row_statistic(x)),
    setup_context=_layer_setup,
    backward=_layer_backward,
    half_on_cuda=True,
)
register(
    "add_layer_norm",
    lambda x, residual, weight, bias, eps: (
        _like(x),
        _like(x),
        _row_statistic(x),
        _row_statistic(x),
    ),
    setup_context=_add_layer_setup,
    backward=_add_layer_backward,
    half_on_cuda=True,
)
register(
    "layer_norm_backward",
    lambda grad_y, x, weight, mean, rstd: (_like(x), _like(weight), _like(weight)),
)
