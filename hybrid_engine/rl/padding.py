"""Between ragged lists and padded [B, T] tensors. Masks come from lengths, never from token ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_rows(rows: Sequence[Sequence[float] | Tensor], width: int | None = None) -> Tensor:
    """Rows of T_b numbers -> float32 [B, T], zeros behind each row; T = max(T_b) unless given."""
    width = max((len(row) for row in rows), default=0) if width is None else width
    padded = torch.zeros(len(rows), width)
    for index, row in enumerate(rows):
        values = row if isinstance(row, Tensor) else torch.tensor(list(row), dtype=torch.float32)
        padded[index, : len(row)] = values
    return padded


def unpad_rows(padded: Tensor, lengths: Tensor) -> Tensor:
    """[B, T] -> the [sum(lengths)] elements inside the lengths, row after row."""
    return padded[length_mask(lengths, padded.shape[1])]


def spread(flat: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Inverse of :func:`unpad_rows`, differentiable: [sum(lengths)] -> [B, width], zeros
    elsewhere."""
    mask = length_mask(lengths, width)
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """Bool [B, width]: true at t < lengths[b]."""
    return torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)
