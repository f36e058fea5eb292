"""Between ragged lists and padded [B, T] tensors. Masks come from lengths, never from token ids."""

from __future__ import annotations

import torch
from torch import Tensor


def spread(flat: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Elements row after row, [sum(lengths)] -> [B, width], zeros past each row's length;
    differentiable.
    """
    mask = length_mask(lengths, width)
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """Bool [B, width]: true at t < lengths[b]."""
    return torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)
