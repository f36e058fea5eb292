"""Whole parameters out of gathered shards, in plain torch."""

from __future__ import annotations

from torch import Tensor


def unshard_(
    out: Tensor,
    shards: Tensor,
    columns: list[int],
    parts: list[int],
    starts: list[int],
    sizes: list[int],
    offsets: list[int],
) -> None:
    """See :func:`hybrid_kernels.ops.unshard_`."""
    runs = zip(columns, parts, starts, sizes, offsets, strict=True)
    for column, part, start, size, offset in runs:
        parameter = shards[:, column : column + part].flatten()
        out[offset : offset + size] = parameter[start : start + size]
