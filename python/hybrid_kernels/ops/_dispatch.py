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
from typing import Any

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

    def apply(self) -> None:
        name = f"{NAMESPACE}::{self.op}"
        torch.library.register_fake(name, self.fake)
        if self.backward is not None:
            # A backward kernel has no derivative of its own: a second one is refused, not zero.
            backward = once_differentiable(self.backward)
            torch.library.register_autograd(name, backward, setup_context=self.setup_context)


_registrations: list[_Registration] = []


def register(
    op: str,
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Tells torch about a native operator, as soon as the library is loaded.

    Args:
        op: its name in csrc/schema.cpp.
        fake: the operator's arguments to empty results of the right shape, dtype and device.
        setup_context: ``(ctx, inputs, output)``: saves what the backward needs, and marks the
            outputs that carry no gradient (``ctx.mark_non_differentiable``).
        backward: ``(ctx, *output_grads)`` to one gradient (or None) for each input.
    """
    _registrations.append(_Registration(op, fake, setup_context, backward))


@functools.cache
def _native_ready() -> bool:
    if not _loader.native_available():
        return False
    for registration in _registrations:
        registration.apply()
    return True


def native_operator(op: str) -> Any:
    """The operator ``torch.ops.hybrid_kernels.<op>``; RuntimeError without the library."""
    if not _native_ready():
        _loader.native_module()  # says why
    return getattr(torch.ops.hybrid_kernels, op).default


def use_native(op: str, *tensors: Tensor | None) -> bool:
    """Whether the native kernel takes these arguments: all on the CPU, the floating ones float32.

    Otherwise the reference runs, with one warning for each (operator, device, dtype).

    Raises:
        RuntimeError: it does not, and ``HYBRID_KERNELS_REQUIRE_NATIVE=1``.
    """
    if not _native_ready():
        return False
    for tensor in tensors:
        if tensor is None or (tensor.is_cpu and tensor.dtype is torch.float32):
            continue
        if not tensor.is_cpu or tensor.is_floating_point():
            _report_fallback(op, tensor.device.type, tensor.dtype)
            return False
    return True


def _report_fallback(op: str, device: str, dtype: torch.dtype) -> None:
    message = f"hybrid_kernels.{op}: no native kernel for {dtype} on {device}"
    if _loader.require_native():
        raise RuntimeError(message)
    _warn_once(f"{message}; using the slower PyTorch reference")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
