"""Cases of the attention family: rows are tokens; columns give the head size and more tokens."""

from __future__ import annotations

import torch

from hybrid_kernels import ops, reference
from hybrid_kernels.testing import Args, BadInput, OpCase, Shape

SHAPES = ("one", "odd", "tile-1", "tile", "tile+1", "empty", "non-contiguous")
HEADS, KV_HEADS = 6, 2


def _int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _packed(shape: Shape, rng: torch.Generator, alibi: bool = False, window: int = 0) -> Args:
    """Three sequences: one of cols tokens, an empty one, one of rows tokens."""
    lengths = [shape.cols if shape.rows else 0, 0, shape.rows]
    tokens, dim = sum(lengths), min(shape.cols, 80)
    q = shape.randn(rng, tokens, HEADS, dim)
    k, v = (shape.randn(rng, tokens, KV_HEADS, dim) for _ in range(2))
    slopes = torch.rand(HEADS, generator=rng) if alibi else None
    return q, k, v, _int32([0, *lengths]).cumsum(0, dtype=torch.int32), dim**-0.5, slopes, window


def _packed_variant(alibi: bool, window: int):
    return lambda shape, rng: _packed(shape, rng, alibi, window)


def _paged(shape: Shape, rng: torch.Generator) -> Args:
    """Sequences of cols and rows + 64 tokens; the last 1 and rows of them are new."""
    lengths, new = [shape.cols, shape.rows + 64], [1, shape.rows]
    dim, max_blocks = 24, max(-(-length // 64) for length in lengths)
    tables = torch.randperm(2 * max_blocks + 1, generator=rng)[: 2 * max_blocks].view(2, -1).int()
    cache = shape.randn(rng, 2 * max_blocks + 1, KV_HEADS, 2, 64, dim)
    q = shape.randn(rng, sum(new), HEADS, dim)
    cu_q = _int32([0, *new]).cumsum(0, dtype=torch.int32)
    return q, cache, tables, _int32(lengths), cu_q, dim**-0.5, None, 0


def _rope(shape: Shape, rng: torch.Generator) -> Args:
    dim = shape.cols + shape.cols % 2
    rotary = dim // 4 * 2  # partly rotated heads; none at the smallest
    q, k = shape.randn(rng, shape.rows, HEADS, dim), shape.randn(rng, shape.rows, KV_HEADS, dim)
    angles = shape.randn(rng, 100, rotary // 2)
    positions = torch.randint(100, (shape.rows,), generator=rng, dtype=torch.int32)
    return q, k, angles.cos(), angles.sin(), positions


def _append(shape: Shape, rng: torch.Generator) -> Args:
    k, v = (shape.randn(rng, shape.rows, KV_HEADS, shape.cols) for _ in range(2))
    cache = torch.randn(3, KV_HEADS, 2, 64, shape.cols, generator=rng)
    return k, v, cache, torch.randperm(3 * 64, generator=rng)[: shape.rows]


def _appended(append):
    def run(k, v, cache, slots):
        cache = cache.clone()
        append(k, v, cache, slots)
        return cache

    return run


def _rope_append(shape: Shape, rng: torch.Generator) -> Args:
    q, k, cos, sin, positions = _rope(shape, rng)
    cache = torch.randn(3, KV_HEADS, 2, 64, q.shape[-1], generator=rng)
    slots = torch.randperm(3 * 64, generator=rng)[: shape.rows]
    return q, k, shape.randn(rng, *k.shape), cos, sin, positions, cache, slots


def _turned_and_appended(append):
    def run(q, k, v, cos, sin, positions, cache, slots):
        cache = cache.clone()
        return append(q, k, v, cos, sin, positions, cache, slots), cache

    return run


def _backward(q, k, v, cu_seqlens, scale, slopes, window):
    out, lse = torch.ops.hybrid_kernels.attention(q, k, v, cu_seqlens, scale, slopes, window)
    return q.cos(), q, k, v, out, lse, cu_seqlens, scale, slopes, window


def _spoil(position: int, change):
    return lambda *args: (*args[:position], change(args[position]), *args[position + 1 :])


# Sums of up to a hundred terms run in order here and in vector lanes in plain torch: a few times
# the error, of which the largest over a whole tensor is compared.
FACTOR = 4.0

CASES = [
    OpCase(
        name="attention",
        function=ops.attention,
        reference=reference.attention,
        make_inputs=_packed,
        operators={"attention": lambda *args: args, "attention_backward": _backward},
        differentiable=(0, 1, 2),
        shapes=SHAPES,
        factor=FACTOR,
        bad_inputs=(
            BadInput(
                "head-size",
                _spoil(1, lambda k: k[..., 1:]),
                r"^attention: k has shape \[126, 2, 79\]; expected \[T, KH, D\]",
            ),
            BadInput(
                "heads",
                _spoil(0, lambda q: q[:, 1:]),
                r"^attention: 5 query heads over 2 key/value heads; expected a multiple",
            ),
            BadInput(
                "offsets-short",
                _spoil(3, lambda c: c[:-1]),
                "cu_seqlens must run from 0 to the number of rows, 126",
            ),
            BadInput(
                "offsets-fall",
                _spoil(3, lambda c: c[[0, 3, 1, 3]]),
                "cu_seqlens falls from 126 to 123 at entry 2",
            ),
            BadInput("offsets-int64", _spoil(3, lambda c: c.long()), "cu_seqlens"),
            BadInput(
                "window",
                _spoil(6, lambda w: -1),
                "window is -1; expected a number of keys, or 0 for all",
            ),
        ),
    ),
    OpCase(
        name="attention:alibi",
        function=ops.attention,
        reference=reference.attention,
        make_inputs=_packed_variant(alibi=True, window=0),
        differentiable=(0, 1, 2),
        shapes=SHAPES,
        factor=FACTOR,
    ),
    OpCase(
        name="attention:window",
        function=ops.attention,
        reference=reference.attention,
        make_inputs=_packed_variant(alibi=True, window=20),
        differentiable=(0, 1, 2),
        shapes=SHAPES,
        factor=FACTOR,
    ),
    OpCase(
        name="paged_attention",
        function=ops.paged_attention,
        reference=reference.paged_attention,
        make_inputs=_paged,
        operators={"paged_attention": lambda *args: args},
        shapes=SHAPES,
        factor=FACTOR,
        bad_inputs=(
            BadInput(
                "block",
                _spoil(2, lambda t: t + 5),
                r"block_tables\[0, \d\] is \d+; the cache has 5 blocks",
            ),
            BadInput(
                "length", _spoil(3, lambda n: n * 0), "sequence 0 has 1 query rows and kv_length 0"
            ),
            BadInput(
                "cache",
                _spoil(1, lambda c: c[:, :, :, :32]),
                r"cache has shape \[5, 2, 2, 32, 24\]",
            ),
        ),
    ),
    OpCase(
        name="rope",
        function=ops.rope,
        reference=reference.rope,
        make_inputs=_rope,
        operators={"rope": lambda *args: args},
        differentiable=(0, 1),
        shapes=SHAPES,
        bad_inputs=(
            BadInput(
                "position",
                _spoil(4, lambda p: p + 100),
                r"positions\[0\] is 1\d\d; cos holds positions 0 to 99",
            ),
            BadInput(
                "too-wide",
                lambda q, k, c, s, p: (q[..., :2], k[..., :2], c, s, p),
                "which rotate 62 elements",
            ),
        ),
    ),
    OpCase(
        name="kv_append",
        function=_appended(ops.kv_append),
        reference=_appended(reference.kv_append),
        make_inputs=_append,
        operators={"kv_append": lambda *args: args},
        shapes=SHAPES,
        bad_inputs=(
            BadInput(
                "slot", _spoil(3, lambda s: s - 192), r"slots\[0\] is -\d+; the cache has 192 slots"
            ),
            BadInput("cache-strided", _spoil(2, lambda c: c.transpose(0, 1)), "cache"),
        ),
    ),
    OpCase(
        name="rope_append",
        function=_turned_and_appended(ops.rope_append),
        reference=_turned_and_appended(reference.rope_append),
        make_inputs=_rope_append,
        operators={"rope_append": lambda *args: args},
        shapes=SHAPES,
        bad_inputs=(
            BadInput(
                "position",
                _spoil(5, lambda p: p + 100),
                r"rope_append: positions\[0\] is 1\d\d; cos holds positions 0 to 99",
            ),
            BadInput("values", _spoil(2, lambda v: v[:, 1:]), r"rope_append: v has shape"),
            BadInput(
                "slot",
                _spoil(7, lambda s: s - 192),
                r"rope_append: slots\[0\] is -\d+; the cache has 192 slots",
            ),
            BadInput("cache-strided", _spoil(6, lambda c: c.transpose(0, 1)), "cache"),
        ),
    ),
]
