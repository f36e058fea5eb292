"""Merging a low-rank adapter into its weight, and taking it out again without a trace.

LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021. Subtracting a delta
that was added does not give the old weight back in floating point; the in-place pair here does, by
recording the few units in the last place that are lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_kernels.ops._dispatch import register, use_native
from hybrid_kernels.reference import lora as reference


@torch.no_grad()
def lora_merge(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, splits: Sequence[int]
) -> Tensor:
    """``weight + scale * B_i A_i`` for each output split i, in fresh storage.

    Args:
        weight: ``[N, K]`` float32 or bfloat16.
        lora_a: ``[S * R, K]``, the splits' A blocks stacked; float32 or the weight's dtype.
        lora_b: ``[N, R]``, each row belonging to the split it falls in; float32 or the weight's
            dtype.
        scale: ``alpha / R`` as a rule.
        splits: S output widths that sum to N.

    Returns:
        ``[N, K]`` in the weight's dtype: the product and the sum in float32, one rounding. Without
        gradient.

    Raises:
        ValueError: wrong shapes, dtypes or splits.
    """
    if not _native("lora_merge", weight, lora_a, lora_b):
        return reference.lora_merge(weight, lora_a, lora_b, scale, list(splits))
    return torch.ops.hybrid_kernels.lora_merge(weight, lora_a, lora_b, scale, list(splits))


@dataclass(frozen=True)
class MergeRecord:
    """What `lora_unmerge_` needs to restore a base weight: a byte a weight, and the escapes."""

    residual: (
        Tensor  # [N, K] int8, units in the last place between the base and what subtraction gives
    )
    escape_index: (
        Tensor  # [E] int64, flat places where an int8 does not reach, or a value is not finite
    )
    escape_value: Tensor  # [E] the base's values there
    versions: tuple[int | None, ...]  # of weight, lora_a and lora_b after the merge


@torch.no_grad()
def lora_merge_(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, splits: Sequence[int]
) -> MergeRecord:
    """:func:`lora_merge` into the weight's own storage, which must be contiguous.

    Returns:
        The record that :func:`lora_unmerge_` takes. Weights smaller than about 1/128 of their delta
        are escapes of 12 bytes each; others cost one byte.
    """
    arguments = (weight, lora_a, lora_b, scale, list(splits))
    if _native("lora_merge_", weight, lora_a, lora_b):
        residual, index, value = torch.ops.hybrid_kernels.lora_merge_(*arguments)
        _mark_changed(weight)
    else:
        residual, index, value = reference.lora_merge_(*arguments)
    return MergeRecord(residual, index, value, _versions(weight, lora_a, lora_b))


@torch.no_grad()
def lora_unmerge_(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    splits: Sequence[int],
    record: MergeRecord,
) -> None:
    """Undoes :func:`lora_merge_`: the weight's storage holds the bytes it held before.

    Takes the arguments of the merge, unchanged, on the same processor.

    Raises:
        ValueError: wrong shapes or dtypes; or the weight or a factor was written to since the
            merge.
    """
    names = ("weight", "lora_a", "lora_b")
    now = _versions(weight, lora_a, lora_b)
    for name, then, current in zip(names, record.versions, now, strict=True):
        if then != current:
            raise ValueError(
                f"lora_unmerge_: {name} was changed in place after lora_merge_; "
                "the base cannot be restored from this record"
            )
    arguments = (weight, lora_a, lora_b, scale, list(splits))
    restore = (record.residual, record.escape_index, record.escape_value)
    if _native("lora_unmerge_", weight, lora_a, lora_b):
        torch.ops.hybrid_kernels.lora_unmerge_(*arguments, *restore)
        _mark_changed(weight)
    else:
        reference.lora_unmerge_(*arguments, *restore)


def _native(op: str, *tensors: Tensor) -> bool:
    """These kernels, unlike the others, take bfloat16 as well: only other tensors decide. On CUDA
    the weight decides: factors in float32 go with every one."""
    if tensors[0].is_cuda:
        return use_native(op, tensors[0])
    return use_native(op, *(t for t in tensors if not (t.is_cpu and t.dtype is torch.bfloat16)))


def _mark_changed(weight: Tensor) -> None:
    """bfloat16 has kernels here, unlike elsewhere: only the other tensors decide."""
    if not weight.is_inference():
        torch.autograd.graph.increment_version(weight)


def _versions(*tensors: Tensor) -> tuple[int | None, ...]:
    """Autograd's counters of in-place changes; inference tensors have none."""
    return tuple(None if t.is_inference() else t._version for t in tensors)


def _fake_merge_in_place(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, splits: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    escapes = torch.library.get_ctx().new_dynamic_size()
    return (
        weight.new_empty(weight.shape, dtype=torch.int8),
        weight.new_empty(escapes, dtype=torch.int64),
        weight.new_empty(escapes),
    )


register(
    "lora_merge",
    lambda weight, lora_a, lora_b, scale, splits: torch.empty_like(
        weight, memory_format=torch.contiguous_format
    ),
    half_on_cuda=True,
)
register("lora_merge_", _fake_merge_in_place, half_on_cuda=True)
register("lora_unmerge_", lambda *arguments: None, half_on_cuda=True)
