"""Whole parameters out of gathered shards, in plain torch."""

from __future__ import annotations

from torch import Tensor


def unshard_(
    out: Tensor, shards: Tensor, parts: list[int], sizes: list[int], offsets: list[int]
) -> None:
    """See :func:`hybrid_kernels.ops.unshard_`."""
    columns = shards.split(parts, dim=1)
    for column, size, offset in zip(columns, sizes, offsets, strict=True):
        out[offset : offset + size] = column.flatten()[:size]
