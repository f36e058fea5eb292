"""Kernels at the sizes of Llama-3-8B, and others' ways to the same result.

A case is built on any device, so that what is compared on a GPU can be seen to be equal on a CPU.
FlashInfer and flash-attn are peers where they are installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hybrid_kernels import ops
from hybrid_kernels.cost import COSTS, Sizes

Call = Callable[[], Any]
BLOCK = 64


@dataclass(frozen=True)
class Scale:
    """Sizes of a model and a batch."""

    width: int = 4096
    feed_forward: int = 14336
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    vocab: int = 128256
    batch: int = 64
    context: int = 2048


@dataclass(frozen=True)
class Case:
    """Our call, its sizes for the cost model, and the peers' calls by name."""

    cost: str
    sizes: Sizes
    ours: Call
    peers: dict[str, Call]

    @property
    def bytes(self) -> int:
        return int(COSTS[self.cost].bytes(self.sizes))

    @property
    def flops(self) -> int:
        return int(COSTS[self.cost].flops(self.sizes))


def norm(scale: Scale, device: str, dtype: torch.dtype) -> Case:
    x, residual = torch.randn(2, 8192 if device == "cuda" else 8, scale.width, device=device).to(
        dtype
    )
    weight = torch.randn(scale.width, device=device).to(dtype)
    return Case(
        "add_rms_norm",
        {"n": x.numel(), "s": dtype.itemsize},
        lambda: ops.add_rms_norm(x, residual, weight, 1e-5)[0],
        {"torch": lambda: functional.rms_norm(x + residual, (scale.width,), weight, 1e-5)},
    )


def gate(scale: Scale, device: str, dtype: torch.dtype) -> Case:
    wide = torch.randn(scale.batch, 2 * scale.feed_forward, device=device).to(dtype)

    def plain() -> Tensor:
        gate, up = wide.chunk(2, -1)
        return functional.silu(gate) * up

    sizes = {"n": wide.numel() // 2, "s": dtype.itemsize}
    return Case(
        "gated_activation", sizes, lambda: ops.gated_activation(wide, "silu"), {"torch": plain}
    )


def linear(scale: Scale, device: str, dtype: torch.dtype) -> Case:
    outputs = 2 * scale.feed_forward
    x = torch.randn(min(scale.batch, 16), scale.width, device=device).to(dtype)
    weight = (torch.randn(outputs, scale.width, device=device) / scale.width**0.5).to(dtype)
    return Case(
        "linear",
        {"M": len(x), "N": outputs, "K": scale.width, "s": dtype.itemsize},
        lambda: ops.linear(x, weight),
        {"torch": lambda: functional.linear(x, weight)},
    )


def gated_linear(scale: Scale, device: str, dtype: torch.dtype) -> Case:
    outputs = 2 * scale.feed_forward
    x = torch.randn(min(scale.batch, 16), scale.width, device=device).to(dtype)
    weight = (torch.randn(outputs, scale.width, device=device) / scale.width**0.5).to(dtype)

    def plain() -> Tensor:
        gate, up = functional.linear(x, weight).chunk(2, -1)
        return functional.silu(gate) * up

    return Case(
        "linear_activation",
        {"M": len(x), "N": outputs, "K": scale.width, "s": dtype.itemsize},
        lambda: ops.linear_activation(x, weight, None, "silu", True),
        {"torch": plain},
    )


def append(scale: Scale, device: str, dtype: torch.dtype) -> Case:
    """What a decode step does to q|k|v, in one launch and in three."""
    parts = [scale.heads, scale.kv_heads, scale.kv_heads]
    qkv = torch.randn(scale.batch, sum(parts), scale.dim, device=device).to(dtype)
    q, k, v = qkv.split(parts, dim=1)
    cos, sin = torch.randn(2, scale.context, scale.dim // 2, device=device)
    positions = torch.arange(scale.batch, dtype=torch.int32, device=device)
    slots = torch.arange(scale.batch, device=device) * BLOCK
    shape = (scale.batch, scale.kv_heads, 2, BLOCK, scale.dim)
    cache = torch.empty(shape, dtype=dtype, device=device)

    def apart() -> Tensor:
        turned, keys = ops.rope(q, k, cos, sin, positions)
        ops.kv_append(keys, v, cache, slots)
        return turned

    return Case(
        "rope_append",
        {"n": qkv.numel(), "s": dtype.itemsize},
        lambda: ops.rope_append(q, k, v, cos, sin, positions, cache, slots),
        {"rope, kv_append": apart},
    )


def sample(scale: Scale, device: str, dtype: torch.dtype) -> Case:
    logits = torch.randn(scale.batch, scale.vocab, device=device).to(dtype)
    ids = torch.arange(scale.batch, device=device)
    return Case(
        "sample",
        {"M": scale.batch, "V": scale.vocab, "s": dtype.itemsize},
        lambda: ops.sample(logits, 1.0, 0, 1.0, 0, ids, ids).logprob,
        {"torch": lambda: logits.float().softmax(-1).multinomial(1)},
    )


def decode(scale: Scale, device: str, dtype: torch.dtype) -> Case:
    """One query a sequence against its cache."""
    blocks, batch = scale.context // BLOCK, scale.batch
    shape = (batch, scale.kv_heads, scale.context, scale.dim)
    keys, values = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    q = torch.randn(batch, scale.heads, scale.dim, device=device).to(dtype)
    paged = torch.stack([keys, values], 2).unflatten(3, (blocks, BLOCK)).permute(0, 3, 1, 2, 4, 5)
    cache = paged.reshape(batch * blocks, scale.kv_heads, 2, BLOCK, scale.dim).contiguous()
    tables = torch.arange(batch * blocks, dtype=torch.int32, device=device).view(batch, blocks)
    lengths = torch.full((batch,), scale.context, dtype=torch.int32, device=device)
    first = torch.arange(batch + 1, dtype=torch.int32, device=device)
    peers: dict[str, Call] = {
        "torch SDPA": lambda: functional.scaled_dot_product_attention(
            q[:, :, None], keys, values, enable_gqa=True
        )[:, :, 0]
    }
    if device == "cuda" and importlib.util.find_spec("flashinfer"):
        peers["FlashInfer"] = _flashinfer(scale, q, cache, lengths)
    if device == "cuda" and importlib.util.find_spec("flash_attn"):
        peers["flash-attn"] = _flash_attn(q, keys, values, lengths)
    return Case(
        "paged_attention",
        {"D": scale.dim, "H": scale.heads, "KH": scale.kv_heads, "s": dtype.itemsize,
         "keys": batch * scale.context},
        lambda: ops.paged_attention(q, cache, tables, lengths, first, scale.dim**-0.5),
        peers,
    )  # fmt: skip


def samples(scale: Scale, device: str, dtype: torch.dtype) -> Case:
    """`decode` of samples whose prompt lies in the same blocks, and in blocks of their own."""
    each = min(16, scale.batch)
    blocks, prompts = scale.context // BLOCK, scale.batch // each
    batch = prompts * each
    shape = (prompts * blocks, scale.kv_heads, 2, BLOCK, scale.dim)
    cache = torch.randn(shape, device=device).to(dtype)
    q = torch.randn(batch, scale.heads, scale.dim, device=device).to(dtype)
    shared = torch.arange(len(cache), dtype=torch.int32, device=device).view(prompts, blocks)
    shared = shared.repeat_interleave(each, 0)
    own = torch.arange(batch * blocks, dtype=torch.int32, device=device).view(batch, blocks)
    copies = cache[shared.flatten().long()]
    lengths = torch.full((batch,), scale.context, dtype=torch.int32, device=device)
    first = torch.arange(batch + 1, dtype=torch.int32, device=device)

    def attend(keys: Tensor, tables: Tensor) -> Tensor:
        return ops.paged_attention(q, keys, tables, lengths, first, scale.dim**-0.5)

    return Case(
        "paged_attention",
        {"D": scale.dim, "H": scale.heads, "KH": scale.kv_heads, "s": dtype.itemsize,
         "keys": prompts * scale.context},
        lambda: attend(cache, shared),
        {"own blocks": lambda: attend(copies, own)},
    )  # fmt: skip


def _flashinfer(scale: Scale, q: Tensor, cache: Tensor, lengths: Tensor) -> Call:
    """Its paged decode, with its plan made beforehand. Pages are [2, 64, KH, D]."""
    import flashinfer

    pages = cache.permute(0, 2, 3, 1, 4).contiguous()
    each = scale.context // BLOCK
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        torch.arange(len(lengths) + 1, dtype=torch.int32, device=q.device) * each,
        torch.arange(len(pages), dtype=torch.int32, device=q.device),
        torch.full_like(lengths, BLOCK),
        scale.heads,
        scale.kv_heads,
        scale.dim,
        BLOCK,
        q_data_type=q.dtype,
    )
    return lambda: wrapper.run(q, pages)


def _flash_attn(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Call:
    """Its decode on a dense cache: [B, S, KH, D]."""
    from flash_attn import flash_attn_with_kvcache

    k, v = (x.transpose(1, 2).contiguous() for x in (keys, values))
    return lambda: flash_attn_with_kvcache(q[:, None], k, v, cache_seqlens=lengths)[:, 0]


CASES: dict[str, Callable[[Scale, str, torch.dtype], Case]] = {
    "norm": norm,
    "gate": gate,
    "linear": linear,
    "gated_linear": gated_linear,
    "append": append,
    "sample": sample,
    "decode": decode,
    "samples": samples,
}
PEERS = dict.fromkeys(CASES, ("torch",)) | {
    "append": ("rope, kv_append",),
    "decode": ("torch SDPA", "FlashInfer", "flash-attn"),
    "samples": ("own blocks",),
}
