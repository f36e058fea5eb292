"""Whole parameters out of the flat shards that an all-gather laid side by side.

ZeRO-3 (Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
2020) keeps an equal part of every flattened parameter on each rank. One collective for many
parameters delivers them rank by rank; this puts each parameter's parts in a row. They are bytes
here, so dtypes may mix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid_kernels.ops._dispatch import register, use_native
from hybrid_kernels.reference import gather as reference


@torch.no_grad()
def unshard_(
    out: Tensor,
    shards: Tensor,
    columns: Sequence[int],
    parts: Sequence[int],
    starts: Sequence[int],
    sizes: Sequence[int],
    offsets: Sequence[int],
) -> None:
    """Writes run r, bytes of one flat parameter, to ``out[offsets[r] : offsets[r] + sizes[r]]``.

    A run is a whole parameter, or a range of it where not all of it is wanted.

    Args:
        out: ``[E]`` uint8, contiguous; what lies between the runs is left alone.
            Like the operators that communicate, this changes memory without autograd's knowledge.
        shards: ``[W, S]`` uint8, the shard of each of W ranks.
        columns: where in a shard the part of run r's parameter begins.
        parts: bytes of that parameter that each rank holds. Where a parameter does not divide,
            the last ranks' parts end in padding.
        starts: first byte of the flat parameter that is wanted.
        sizes: bytes that are wanted; they end within ``W * parts[r]``.
        offsets: where run r begins in ``out``; ascending, without overlap.

    Raises:
        ValueError: wrong shapes or lists.
    """
    lists = [list(numbers) for numbers in (columns, parts, starts, sizes, offsets)]
    if use_native("unshard_", out, shards):
        torch.ops.hybrid_kernels.unshard_(out, shards, *lists)
    else:
        reference.unshard_(out, shards, *lists)


register("unshard_", lambda *arguments: None)
