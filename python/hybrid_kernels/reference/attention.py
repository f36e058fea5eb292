"""Attention, rotary embedding and the paged cache in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

KV_BLOCK = 64  # tokens in a block of the paged cache


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    alibi_slopes: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """Causal softmax attention of packed sequences, one at a time, scores in full."""
    bounds = cu_seqlens.tolist()
    outs = [
        _attend(q[start:end], k[start:end], v[start:end], scale, alibi_slopes, window)
        for start, end in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    return torch.cat(outs) if outs else q.clone()


def paged_attention(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    kv_lengths: Tensor,
    cu_q: Tensor,
    scale: float,
    alibi_slopes: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """The same for the last queries of sequences whose keys and values lie in a paged cache."""
    bounds = cu_q.tolist()
    outs = []
    for i, length in enumerate(kv_lengths.tolist()):
        blocks = block_tables[i, : -(-length // KV_BLOCK)].long()
        k, v = (
            cache[blocks].permute(2, 0, 3, 1, 4).flatten(1, 2)[:, :length]
        )  # [length, KH, D] each
        outs.append(_attend(q[bounds[i] : bounds[i + 1]], k, v, scale, alibi_slopes, window))
    return torch.cat(outs) if outs else q.clone()


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, alibi_slopes: Tensor | None, window: int
) -> Tensor:
    """``q [Q, H, D]`` against ``k, v [S, KH, D]``; the queries are the last of the S positions."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    key = torch.arange(k.shape[0], device=q.device)
    query = key[k.shape[0] - q.shape[0] :, None]
    if alibi_slopes is not None:
        scores = scores + alibi_slopes[:, None, None] * (key - query)
    visible = key <= query
    if window > 0:
        visible = visible & (key > query - window)
    scores = scores.masked_fill(~visible, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1).to(v.dtype), v)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotates element i of each head with element i + rotary / 2, for i < rotary / 2."""
    cos, sin = cos[positions.long()][:, None], sin[positions.long()][:, None]
    half = cos.shape[-1]

    def rotate(x: Tensor) -> Tensor:
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return torch.cat((turned.to(x.dtype), rest), dim=-1)  # the tables stay fp32

    return rotate(q), rotate(k)


def kv_append(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Writes ``k, v [T, KH, D]`` at their slots (block * 64 + offset) of the cache."""
    block, offset = slots // KV_BLOCK, slots % KV_BLOCK
    cache[block, :, 0, offset] = k
    cache[block, :, 1, offset] = v


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Rotates, appends ``k`` and ``v``, and gives ``q``."""
    q, k = rope(q, k, cos, sin, positions)
    kv_append(k, v, cache, slots)
    return q
