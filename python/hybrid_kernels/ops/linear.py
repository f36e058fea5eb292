"""The linear layer, with an optional low-rank term for each block of its outputs.

LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.

On CUDA, tensors may also be float16 or bfloat16; up to 16 rows run a kernel with one order of sums,
more rows and `matmul` run cuBLAS, whose order is its own. With ``HYBRID_KERNELS_EXACT=1`` any
number of rows runs one Triton kernel (`ops._exact`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybrid_kernels import reference
from hybrid_kernels.ops._dispatch import register, use_native, use_native_with_weight, widened
from hybrid_kernels.ops._exact import exact
from hybrid_kernels.ops.activation import bias_activation, gated_activation


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    lora_splits: Sequence[int] | None = None,
) -> Tensor:
    """Linear layer: ``y = x W^T + b``, plus ``scale * (x A_s^T) B_s^T`` on output split s.

    Each output element is summed over K in one order, whatever the batch: a row of ``x`` gives the
    same bits alone, in any batch, at any place and with any number of threads. On a processor whose
    matrix unit does the sums (AMX), subnormal numbers count as zero and infinite ones give NaN.

    Args:
        x: ``[..., K]`` float32.
        weight: ``[N, K]`` float32 or bfloat16, the training layout; read where it lies. The result
            is that of the same weight in float32, bit for bit: bfloat16 is widened on its way.
        bias: ``[N]`` or None. This and the factors are float32, or bfloat16, which is widened.
        lora_a: ``[S * R, K]`` or None: the ``[R, K]`` factors of S splits, stacked.
        lora_b: ``[N, R]`` or None: row n belongs to the split that output n falls in.
        lora_scale: the factor of the low-rank term.
        lora_splits: sizes of the S splits, summing to N; None means one split.

    Returns:
        ``[..., N]`` float32. The backward keeps only what the wanted gradients need, and computes
        ``x A^T`` again. Its sums run in order too, so gradients do not depend on the thread count.

    Raises:
        ValueError: shapes that do not fit, or only one of ``lora_a`` and ``lora_b``.
    """
    if (lora_a is None) != (lora_b is None):
        raise ValueError("linear: lora_a and lora_b come together; expected both or none")
    splits = list(lora_splits or ([] if lora_a is None else [weight.shape[0]]))
    if exact(x):
        return exact_linear(x, weight, bias, lora_a, lora_b, lora_scale, splits, False)
    bias, lora_a, lora_b = (widened(part, x) for part in (bias, lora_a, lora_b))
    if not use_native_with_weight("linear", x, weight, bias, lora_a, lora_b):
        weight = widened(weight, x)
        return reference.linear(x, weight, bias, lora_a, lora_b, lora_scale, splits)
    return torch.ops.hybrid_kernels.linear(x, weight, bias, lora_a, lora_b, lora_scale, splits)


def linear_activation(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    gated: bool,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    lora_splits: Sequence[int] | None = None,
) -> Tensor:
    """`linear` and the activation of its result, which up to 16 rows on CUDA is never stored: the
    first half of an MLP in a decode step.

    The same bits as `linear` and then `bias_activation` or `gated_activation`; not differentiable.

    Args:
        x: ``[..., K]``; this, ``weight``, ``bias`` and the low-rank term as in `linear`.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.
        kind: ``relu``, ``silu``, ``gelu_tanh`` or ``gelu_erf``.
        gated: the N outputs are ``gate | up``, and the result is ``act(gate) * up``.
        lora_a: ``[S * R, K]`` or None.
        lora_b: ``[N, R]`` or None.
        lora_scale: the factor of the low-rank term.
        lora_splits: sizes of the S splits, summing to N; None means one split.

    Returns:
        ``[..., N]``, or where gated ``[..., N / 2]``.

    Raises:
        ValueError: shapes that do not fit, an odd N of a gated layer, an unknown kind.
    """
    splits = list(lora_splits or ([] if lora_a is None else [weight.shape[0]]))
    if exact(x):
        wide = exact_linear(x, weight, bias, lora_a, lora_b, lora_scale, splits, False)
        return gated_activation(wide, kind) if gated else bias_activation(wide, None, kind)
    bias, lora_a, lora_b = (widened(part, x) for part in (bias, lora_a, lora_b))
    if not use_native_with_weight("linear_activation", x, weight, bias, lora_a, lora_b):
        weight = widened(weight, x)
        wide = reference.linear(x, weight, bias, lora_a, lora_b, lora_scale, splits)
        return reference.activate(wide, kind, gated)
    return torch.ops.hybrid_kernels.linear_activation(
        x, weight, bias, lora_a, lora_b, lora_scale, splits, kind, gated
    )


def logits_of(hidden: Tensor, weight: Tensor) -> Tensor:
    """``hidden W^T`` in float32, unrounded, where products are exact on CUDA."""
    return exact_linear(hidden, weight, None, None, None, 1.0, [], True)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a b``, each element summed in the one order of `linear`: what its gradients use.

    Args:
        a: ``[M, K]`` float32, any strides (a transposed view costs no copy).
        b: ``[K, N]`` float32, or bfloat16, which is widened.

    Returns:
        ``[M, N]`` float32.

    Raises:
        ValueError: shapes that do not fit.
    """
    b = widened(b, a)
    if not use_native("matmul", a, b):
        return reference.matmul(a, b)
    return torch.ops.hybrid_kernels.matmul(a, b)


def linear_recomputed(
    weight_of: Callable[[], Tensor],
    x: Tensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    lora_splits: Sequence[int] | None = None,
) -> Tensor:
    """`linear` with a frozen weight that is computed, and not kept until the backward pass.

    Args:
        weight_of: the weight ``[N, K]``, the same bits at every call: once now, and once more where
            ``x`` wants a gradient. Nothing is differentiated through it, or through ``bias``.
    """
    return _Recomputed.apply(
        weight_of, x, bias, lora_a, lora_b, lora_scale, list(lora_splits or ())
    )


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    lora_splits: list[int],
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, lora_a, lora_b, ctx.lora_scale, ctx.lora_splits = inputs
    ctx.weight_dtype = weight.dtype
    wants_x, wants_weight, _, wants_a, wants_b, *_ = ctx.needs_input_grad
    needs_x = wants_weight or wants_a or wants_b
    ctx.save_for_backward(
        x if needs_x else None,
        weight if wants_x else None,
        lora_a if wants_x or wants_b else None,
        lora_b if wants_x or wants_a else None,
    )


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_a, lora_b = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, wants_a, wants_b, *_ = ctx.needs_input_grad
    grad = grad_y.reshape(-1, grad_y.shape[-1]).contiguous()
    rows: Any = None if x is None else x.reshape(-1, x.shape[-1])
    grad_x = matmul(grad, weight) if wants_x else None
    grad_weight = matmul(grad.T, rows).to(ctx.weight_dtype) if wants_weight else None
    grad_bias = grad.sum(0) if wants_bias else None
    grad_a = grad_b = None
    if lora_b is not None:
        inner = _through_b(grad, lora_b, ctx.lora_splits).mul_(ctx.lora_scale)
        if grad_x is not None:
            grad_x += matmul(inner, lora_a)
        grad_a = matmul(inner.T, rows) if wants_a else None
    if wants_b:
        grad_b = _grad_b(grad, linear(rows, lora_a).mul_(ctx.lora_scale), ctx.lora_splits)
    if grad_x is not None:
        grad_x = grad_x.view(*grad_y.shape[:-1], grad_x.shape[-1])
    return grad_x, grad_weight, grad_bias, grad_a, grad_b, None, None


def _through_b(grad: Tensor, lora_b: Tensor, splits: list[int]) -> Tensor:
    """What arrives at ``x A^T``, ``[T, S * R]``: each split's gradient through its rows of B."""
    pairs = zip(grad.split(splits, dim=1), lora_b.split(splits), strict=True)
    return torch.cat([matmul(g, b) for g, b in pairs], dim=1)


def _grad_b(grad: Tensor, projected: Tensor, splits: list[int]) -> Tensor:
    """The gradient of B, ``[N, R]``, from ``projected = scale * x A^T [T, S * R]``."""
    pairs = zip(grad.split(splits, dim=1), projected.chunk(len(splits), dim=1), strict=True)
    return torch.cat([matmul(g.T, p) for g, p in pairs])


def _fake_activation(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    columns = weight.shape[0] // 2 if rest[-1] else weight.shape[0]
    return x.new_empty((*x.shape[:-1], columns))


register("linear_activation", _fake_activation, half_on_cuda=True)
register("linear", _fake, setup_context=_setup, backward=_backward, half_on_cuda=True)
register("matmul", lambda a, b: a.new_empty((a.shape[0], b.shape[1])), half_on_cuda=True)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight_of: Callable[[], Tensor],
        x: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        lora_scale: float,
        lora_splits: list[int],
    ) -> Tensor:
        weight = weight_of()
        ctx.weight_of, ctx.lora_scale = weight_of, lora_scale
        ctx.lora_splits = lora_splits or [weight.shape[0]]
        wants_adapter = lora_a is not None and any(ctx.needs_input_grad[3:5])
        ctx.save_for_backward(x if wants_adapter else None, lora_a, lora_b)
        return linear(x, weight, bias, lora_a, lora_b, lora_scale, lora_splits or None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_a, lora_b = ctx.saved_tensors
        _, wants_x, _, wants_a, wants_b, *_ = ctx.needs_input_grad
        weight = ctx.weight_of() if wants_x else None
        whole = SimpleNamespace(
            saved_tensors=(x, weight, lora_a, lora_b),
            needs_input_grad=(wants_x, False, False, wants_a, wants_b),
            lora_scale=ctx.lora_scale,
            lora_splits=ctx.lora_splits,
        )
        grad_x, _, _, grad_a, grad_b, *_ = _backward(whole, grad_y)
        return None, grad_x, None, grad_a, grad_b, None, None


# Triton's kernel has the same backward; its sums may come unrounded, in float32.


def exact_linear(*arguments: Any) -> Tensor:
    """`ops._exact`'s operator."""
    return torch.ops.hybrid_kernels_triton.linear(*arguments)


def _exact_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _setup(ctx, inputs[:-1], output)


def _exact_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(ctx, grad_y.to(ctx.weight_dtype)), None


torch.library.register_autograd(
    "hybrid_kernels_triton::linear",
    once_differentiable(_exact_backward),
    setup_context=_exact_setup,
)
