"""Causal attention over packed sequences and over a paged cache, rotary embedding, cache append.

Training, prefill and decode share one tile size and one order of sums, so a token's output has the
same bits in all of them.

On CUDA, queries, keys, values and the cache may be float16 or bfloat16. Lengths, tables, positions
and slots are not checked there: looking at them would wait for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybrid_kernels import reference
from hybrid_kernels.ops._dispatch import register, use_native


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    alibi_slopes: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """Causal attention inside each packed sequence: ``softmax(scale * q k^T + bias) v``.

    Args:
        q: ``[T, H, D]`` float32; rows may be strided, as a view of a fused q|k|v.
        k: ``[T, KH, D]`` float32, H a multiple of KH; query head h reads head ``h // (H / KH)``.
        v: like ``k``.
        cu_seqlens: ``[B + 1]`` int32, the sequences' first rows and T.
        scale: of the scores.
        alibi_slopes: ``[H]`` float32 or None: adds ``slope * (key - query)`` (Press et al., 2021).
        window: keys a query sees, itself included; 0 means all before it.

    Returns:
        ``[T, H, D]`` float32, contiguous. The backward recomputes the probabilities from the
        log-sum-exp.

    Raises:
        ValueError: shapes that do not fit, or ``cu_seqlens`` that do not cover the rows.
    """
    if not use_native("attention", q, k, v):
        return reference.attention(q, k, v, cu_seqlens, scale, alibi_slopes, window)
    out, _ = torch.ops.hybrid_kernels.attention(q, k, v, cu_seqlens, scale, alibi_slopes, window)
    return out


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
    """`attention` of new queries against keys and values in a paged cache; not differentiable.

    Args:
        q: ``[T, H, D]`` float32; sequence i's rows are its last positions.
        cache: ``[blocks, KH, 2, 64, D]`` float32: keys, then values, of 64 tokens.
        block_tables: ``[B, max_blocks]`` int32: where tokens ``64 j`` to ``64 j + 63`` lie.
        kv_lengths: ``[B]`` int32: tokens in the cache, the new ones included.
        cu_q: ``[B + 1]`` int32: the sequences' first rows of q, and T.
        scale: of the scores.
        alibi_slopes: ``[H]`` float32 or None.
        window: keys a query sees, itself included; 0 means all before it.

    Returns:
        ``[T, H, D]`` float32.

    Raises:
        ValueError: shapes that do not fit, a block outside the cache, more rows than cached tokens.
    """
    if not use_native("paged_attention", q, cache):
        return reference.paged_attention(
            q, cache, block_tables, kv_lengths, cu_q, scale, alibi_slopes, window
        )
    out, _ = torch.ops.hybrid_kernels.paged_attention(
        q, cache, block_tables, kv_lengths, cu_q, scale, alibi_slopes, window
    )
    return out


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (Su et al., 2021), half-split as in transformers.

    Element i < rotary / 2 of each head turns with element i + rotary / 2; the rest, from rotary on,
    stays.

    Args:
        q: ``[T, H, D]`` float32.
        k: ``[T, KH, D]`` float32.
        cos: ``[P, rotary / 2]`` float32, by position.
        sin: like ``cos``.
        positions: ``[T]`` int32 in [0, P).

    Returns:
        Rotated ``(q, k)`` in fresh storage. The backward turns gradients by the opposite angle;
        ``cos`` and ``sin`` get none.

    Raises:
        ValueError: shapes that do not fit, or a position outside the tables.
    """
    if not use_native("rope", q, k):
        return reference.rope(q, k, cos, sin, positions)
    return torch.ops.hybrid_kernels.rope(q, k, cos, sin, positions)


def kv_append(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Writes keys and values of new tokens into a paged cache.

    Args:
        k: ``[T, KH, D]`` float32.
        v: like ``k``.
        cache: ``[blocks, KH, 2, 64, D]`` float32, contiguous; changed in place.
        slots: ``[T]`` int64: block * 64 + offset, each once.

    Raises:
        ValueError: shapes that do not fit, or a slot outside the cache.
    """
    if not use_native("kv_append", k, v, cache):
        reference.kv_append(k, v, cache, slots)
        return
    torch.ops.hybrid_kernels.kv_append(k, v, cache, slots)


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
    """`rope`, then `kv_append` of the turned keys, in one pass: what a decode step does to q|k|v.

    The same bits as the two; not differentiable.

    Args:
        q: ``[T, H, D]`` float32; rows of this, ``k`` and ``v`` may be strided, as views of a fused
            q|k|v.
        k: ``[T, KH, D]`` float32.
        v: like ``k``.
        cos: ``[P, rotary / 2]`` float32, by position.
        sin: like ``cos``.
        positions: ``[T]`` int32 in [0, P).
        cache: ``[blocks, KH, 2, 64, D]`` float32, contiguous; changed in place.
        slots: ``[T]`` int64: block * 64 + offset, each once.

    Returns:
        Rotated ``q``, ``[T, H, D]``, contiguous.

    Raises:
        ValueError: shapes that do not fit, a position outside the tables, a slot outside the cache.
    """
    if not use_native("rope_append", q, k, v, cache):
        return reference.rope_append(q, k, v, cos, sin, positions, cache, slots)
    return torch.ops.hybrid_kernels.rope_append(q, k, v, cos, sin, positions, cache, slots)


# What torch must know.


def _fake_attention(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return q.new_empty(q.shape), lse


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.scale, alibi_slopes, ctx.window = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, alibi_slopes)


def _attention_backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, alibi_slopes = ctx.saved_tensors
    grads = torch.ops.hybrid_kernels.attention_backward(
        grad_out, *tensors, ctx.scale, alibi_slopes, ctx.window
    )
    return *grads, None, None, None, None


def _rope_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[2:])


def _rope_backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin, positions = ctx.saved_tensors
    grads = torch.ops.hybrid_kernels.rope(grad_q, grad_k, cos, -sin, positions)
    return *grads, None, None, None


register(
    "attention",
    _fake_attention,
    setup_context=_attention_setup,
    backward=_attention_backward,
    half_on_cuda=True,
)
register(
    "attention_backward",
    lambda grad_out, q, k, v, *_: (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
    ),
)
register("paged_attention", _fake_attention, half_on_cuda=True)
register(
    "rope",
    lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
    setup_context=_rope_setup,
    backward=_rope_backward,
    half_on_cuda=True,
)
register("kv_append", lambda *_: None, half_on_cuda=True)
register("rope_append", lambda q, *_: q.new_empty(q.shape), half_on_cuda=True)
