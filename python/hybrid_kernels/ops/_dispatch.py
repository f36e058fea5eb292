"""Native kernel or reference: the choice of every wrapper, and what torch must know of kernels.

A wrapper reads::

    def rms_norm(x, weight, eps):
        if not use_native("rms_norm", x, weight):
            return reference.rms_norm(x, weight, eps)
        return torch.ops.hybrid_kernels.rms_norm(x, weight, eps)[0]

and beside it one `register` call gives the operator's fake (shapes without data, for
``torch.compile`` and meta tensors) and, where it is differentiable, its backward.

Backwards are registered with ``torch.library`` on the operator itself rather than wrapped around
it in a ``torch.autograd.Function``: then the operator is differentiable for every caller,
compiled code included, and ``torch.library.opcheck`` can verify it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybrid_kernels import _loader

NAMESPACE = "hybrid_kernels"


@dataclass(frozen=True)
class _Registration:
    op: str
    fake: Callable[..., Any]
    setup_context: Callable[..., None] | None
    backward: Callable[..., Any] | None
    half_on_cuda: bool

    def apply(self) -> None:
        name = f"{NAMESPACE}::{self.op}"
        torch.library.register_fake(name, self.fake)
        if self.backward is not None:
            # A backward kernel has no derivative of its own: a second one is refused, not zero.
            backward = once_differentiable(self.backward)
            torch.library.register_autograd(name, backward, setup_context=self.setup_context)


_registrations: dict[str, _Registration] = {}


def register(
    op: str,
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    half_on_cuda: bool = False,
) -> None:
    """Tells torch about a native operator, as soon as the library is loaded.

    Args:
        op: its name in csrc/schema.cpp.
        fake: the operator's arguments to empty results of the right shape, dtype and device.
        setup_context: ``(ctx, inputs, output)``: saves what the backward needs, and marks the
            outputs that carry no gradient (``ctx.mark_non_differentiable``).
        backward: ``(ctx, *output_grads)`` to one gradient (or None) for each input.
        half_on_cuda: its CUDA kernel takes float16 and bfloat16 beside float32.
    """
    _registrations[op] = _Registration(op, fake, setup_context, backward, half_on_cuda)


@functools.cache
def _native_ready() -> bool:
    if not _loader.native_available():
        return False
    for registration in _registrations.values():
        registration.apply()
    return True


def native_operator(op: str) -> Any:
    """The operator ``torch.ops.hybrid_kernels.<op>``; RuntimeError without the library."""
    if not _native_ready():
        _loader.native_module()  # says why
    return getattr(torch.ops.hybrid_kernels, op).default


def use_native(op: str, *tensors: Tensor | None) -> bool:
    """Whether a native kernel takes these arguments.

    On the CPU the floating ones are float32; on CUDA they have one dtype, which the operator's
    kernel there knows. Otherwise the reference runs, with one warning for each (operator, device,
    dtype).

    Raises:
        RuntimeError: it does not, and ``HYBRID_KERNELS_REQUIRE_NATIVE=1``.
    """
    if not _native_ready():
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    floating = [tensor.dtype for tensor in given if tensor.is_floating_point()]
    for tensor in given:
        if tensor.device.type != given[0].device.type or not _takes(op, tensor, floating):
            _report_fallback(op, tensor.device.type, tensor.dtype)
            return False
    return True


def _takes(op: str, tensor: Tensor, floating: list[torch.dtype]) -> bool:
    if tensor.is_cpu:
        return not tensor.is_floating_point() or tensor.dtype is torch.float32
    if not tensor.is_cuda or not _has_cuda_kernel(op):
        return False
    return not tensor.is_floating_point() or (
        tensor.dtype is floating[0]
        and (
            tensor.dtype is torch.float32
            or (tensor.dtype in _HALF and _registrations[op].half_on_cuda)
        )
    )


_HALF = (torch.float16, torch.bfloat16)


@functools.cache
def _has_cuda_kernel(op: str) -> bool:
    """Whether the native library was built with a CUDA kernel of an operator."""
    return _native_ready() and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"{NAMESPACE}::{op}", "CUDA"
    )


def use_native_with_weight(op: str, rows: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """:func:`use_native` for a kernel that also reads a bfloat16 weight beside float32 rows."""
    reads = rows.dtype is torch.float32 and weight.is_cpu and weight.dtype is torch.bfloat16
    return use_native(op, rows, None if reads else weight, *others)


@overload
def widened(parameter: Tensor, rows: Tensor) -> Tensor: ...


@overload
def widened(parameter: None, rows: Tensor) -> None: ...


@overload
def widened(parameter: Tensor | None, rows: Tensor) -> Tensor | None: ...


def widened(parameter: Tensor | None, rows: Tensor) -> Tensor | None:
    """A bfloat16 parameter as float32, which is exact, where it meets float32 rows."""
    if parameter is None or parameter.dtype is not torch.bfloat16:
        return parameter
    return parameter.float() if rows.dtype is torch.float32 else parameter


def activations(rows: Tensor) -> Tensor:
    """Rows looked up in a table, in the dtype that all activations after them have.

    The native kernels read bfloat16 weights and compute in float32; so activations are float32 on
    the CPU then. Elsewhere, and in the reference, they have the weights' dtype.
    """
    native = rows.is_cpu and rows.dtype is torch.bfloat16 and _native_ready()
    return rows.float() if native else rows


def _report_fallback(op: str, device: str, dtype: torch.dtype) -> None:
    message = f"hybrid_kernels.{op}: no native kernel for {dtype} on {device}"
    if _loader.require_native():
        raise RuntimeError(message)
    _warn_once(f"{message}; using the slower PyTorch reference")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
