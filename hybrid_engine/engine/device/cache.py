"""The paged key-value cache on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_engine.models import DecoderSpec

from .walk import BLOCK


class DeviceCache:
    """Blocks of 64 tokens in all layers, and one more for rows without a sample.

    Args:
        blocks: that samples may have.
    """

    def __init__(
        self, spec: DecoderSpec, blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.blocks = blocks
        shape = (spec.num_layers, blocks + 1, spec.kv_heads, 2, BLOCK, spec.head_dim)
        self.tensor: Tensor = torch.empty(shape, dtype=dtype, device=device)

    @property
    def idle_block(self) -> int:
        return self.blocks

    def copy(self, source: int, target: int) -> None:
        """For a fork: behind everything that has been asked of the device so far."""
        self.tensor[:, target].copy_(self.tensor[:, source])


def block_bytes(spec: DecoderSpec, dtype: torch.dtype) -> int:
    """Of one block, in all layers."""
    return spec.num_layers * 2 * spec.kv_size * BLOCK * dtype.itemsize
