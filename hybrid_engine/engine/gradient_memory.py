"""The memory where ZeRO-3 keeps a rank's gradients from backward to step, lent in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PARTS = "__param_id_to_grad_partition"  # DeepSpeed's, private to its class


class GradientMemory:
    """One flat buffer of DeepSpeed's, of which every trained parameter has a part.

    While it is lent it may be written to; :meth:`take_back` leaves it as DeepSpeed knows it.

    Args:
        flat: the buffer.
        parts: views of it.
        accumulating: whether gradients wait in it for their step.
    """

    def __init__(self, flat: Tensor, parts: list[Tensor], accumulating: Callable[[], bool]) -> None:
        self._flat, self._parts = flat, parts
        self._accumulating = accumulating
        self._lent = False
        self._kept: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self._flat.nbytes

    @torch.no_grad()
    def move_to(self, memory: Tensor) -> None:
        """From now on DeepSpeed keeps gradients there: as many bytes, aligned for their type."""
        moved = memory.view(self._flat.dtype)
        moved.copy_(self._flat)
        for part in self._parts:
            begin = part.storage_offset() - self._flat.storage_offset()
            part.data = moved[begin : begin + part.numel()].view(part.shape)
        self._flat.data = moved

    def lies_in(self, memory: Tensor) -> bool:
        """Whether it was moved there, and not on."""
        return self._flat.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()

    def lend(self) -> None:
        """Gradients that wait for their step are put aside, unless they are still from a phase that
        broke off.
        """
        if not self._lent:
            self._kept = self._flat.clone() if self._accumulating() else None
        self._lent = True

    @torch.no_grad()
    def take_back(self) -> None:
        """Undoes :meth:`lend`, if need be. A part that gets no gradient, or is padding, counts as a
        gradient of zero.
        """
        if not self._lent:
            return
        if self._kept is None:
            self._flat.zero_()
        else:
            self._flat.copy_(self._kept)
        self._lent, self._kept = False, None


def gradient_memory(optimizer: Any, accumulating: Callable[[], bool]) -> GradientMemory | None:
    """That of DeepSpeed's ZeRO-3 optimizer, on a CPU; None where it has none of this form, as with
    an offloaded optimizer.
    """
    flat = getattr(optimizer, "grad_partitions_flat_buffer", None)
    parts = next((v for name, v in vars(optimizer).items() if name.endswith(_PARTS)), None)
    if flat is None or parts is None or flat.device.type != "cpu" or optimizer.offload_optimizer:
        return None
    views = list(parts.values())
    if any(v.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr() for v in views):
        return None
    return GradientMemory(flat, views, accumulating)
