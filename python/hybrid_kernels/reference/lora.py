"""Merging low-rank adapters into weights in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def lora_delta(lora_a: Tensor, lora_b: Tensor, scale: float, splits: list[int]) -> Tensor:
    """``scale * B_i A_i`` stacked over the output splits: [N, K].

    Args:
        lora_a: [S * R, K], the splits' A blocks stacked.
        lora_b: [N, R], each row belonging to the split it falls in.
        scale: ``alpha / r`` as a rule.
        splits: S output widths that sum to N.
    """
    blocks = zip(lora_a.chunk(len(splits)), lora_b.split(list(splits)), strict=True)
    return scale * torch.cat([b @ a for a, b in blocks])


def lora_merge(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, splits: list[int]
) -> Tensor:
    """``weight + lora_delta(...)`` in fresh storage: [N, K], one rounding from at least float32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    delta = lora_delta(lora_a.to(wide), lora_b.to(wide), scale, splits)
    return (weight.to(wide) + delta).to(weight.dtype)


def lora_merge_(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, splits: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge in place, and return what :func:`lora_unmerge_` needs to restore the base bit for bit.

    Subtracting the delta again lands near the base, usually within a few units in the last place.
    The residual [N, K] int8 counts those units; where the count does not fit, or a value is not
    finite, the base value itself is kept in the escape list (flat index int64 [E], value [E]).
    """
    base = weight.clone()
    weight.copy_(lora_merge(weight, lora_a, lora_b, scale, splits))
    units = _ordered(base) - _ordered(_subtract_delta(weight, lora_a, lora_b, scale, splits))
    escape = (units.abs() > 127) | ~torch.isfinite(weight) | ~torch.isfinite(base)
    escape_index = escape.flatten().nonzero().squeeze(-1)
    residual = units.masked_fill(escape, 0).to(torch.int8)
    return residual, escape_index, base.flatten()[escape_index]


def lora_unmerge_(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    splits: list[int],
    residual: Tensor,
    escape_index: Tensor,
    escape_value: Tensor,
) -> None:
    """Undo :func:`lora_merge_`: the weight holds the bytes it held before."""
    near = _ordered(_subtract_delta(weight, lora_a, lora_b, scale, splits))
    weight.copy_(_from_ordered(near + residual, weight.dtype))
    weight.view(-1)[escape_index] = escape_value


def _subtract_delta(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, splits: list[int]
) -> Tensor:
    return lora_merge(weight, lora_a, lora_b, -scale, splits)


def _integer_of(dtype: torch.dtype) -> torch.dtype:
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


def _ordered(x: Tensor) -> Tensor:
    """Bits as int64 in the order of the values: neighbours differ by 1, -0 comes before +0."""
    bits = x.contiguous().view(_integer_of(x.dtype)).to(torch.int64)
    top = 1 << (8 * x.dtype.itemsize - 1)
    return torch.where(bits < 0, -(bits + top) - 1, bits)


def _from_ordered(ordered: Tensor, dtype: torch.dtype) -> Tensor:
    top = 1 << (8 * dtype.itemsize - 1)
    bits = torch.where(ordered < 0, -(ordered + 1) - top, ordered)
    return bits.to(_integer_of(dtype)).view(dtype)
