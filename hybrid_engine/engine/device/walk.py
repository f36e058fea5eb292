"""The layer walk over packed rows and a paged cache: `csrc/engine/forward.cpp`, operator by
operator.

It works on tensors by name rather than on modules, because under ZeRO-3 the whole parameters lie in
the gather's arena and the module's own are elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from hybrid_engine.engine.program import Adapter
from hybrid_engine.models import DecoderSpec
from hybrid_kernels import ops

BLOCK = 64  # tokens of a cache block: the attention kernels' tile

Await = Callable[[int], None]  # a part of the weights, numbered as in csrc/engine/weight_gate.h


def nothing_to_await(part: int) -> None:
    """All weights are there."""


@dataclass(frozen=True)
class Rows:
    """T rows of B sequences, sequence after sequence: each one's last positions.

    Attributes:
        tokens: int64 ``[T]``.
        positions: int32 ``[T]``.
        slots: int64 ``[T]``, block * 64 + offset: where a row's key and value go.
        block_tables: int32 ``[B, width]``.
        kv_lengths: int32 ``[B]``, the rows included.
        first_rows: int32 ``[B + 1]``.
        wanted: int64 ``[N]``, the rows whose hidden state is wanted; None for all.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    block_tables: Tensor
    kv_lengths: Tensor
    first_rows: Tensor
    wanted: Tensor | None = None


class LayerWalk:
    """A decoder's forward pass against a cache.

    Args:
        spec: the decoder.
        tensors: its parameters by name, with ``rope_cos``, ``rope_sin`` or ``alibi_slopes``.
        adapters: of every layer that has low-rank factors among the tensors.
    """

    def __init__(
        self, spec: DecoderSpec, tensors: Mapping[str, Tensor], adapters: Mapping[str, Adapter]
    ) -> None:
        self.spec = spec
        self._tensors = dict(tensors)
        self._adapters = dict(adapters)

    @property
    def head(self) -> Tensor:
        """``[V, embed_dim]``."""
        return self._tensors["head.weight"]

    def run(self, rows: Rows, cache: Tensor, await_part: Await = nothing_to_await) -> Tensor:
        """Appends the rows to ``cache [layers, blocks, KH, 2, 64, D]``.

        Returns:
            What the head reads of the wanted rows, ``[N, embed_dim]``.
        """
        await_part(0)
        hidden, delta = self._embed(rows), None
        for layer in range(self.spec.num_layers):
            await_part(layer + 1)
            block = self._post_norm_block if self.spec.norm_position == "post" else self._block
            hidden, delta = block(f"decoder.blocks.{layer}", hidden, delta, rows, cache[layer])
        await_part(self.spec.num_layers + 1)
        if rows.wanted is not None:
            hidden = hidden.index_select(0, rows.wanted)
            delta = None if delta is None else delta.index_select(0, rows.wanted)
        return self._finish(hidden, delta)

    def _embed(self, rows: Rows) -> Tensor:
        table = self._tensors["decoder.embed_tokens.weight"]
        hidden = ops.activations(embedding(rows.tokens, table))
        if self.spec.embed_dim != self.spec.hidden_size:
            hidden = self._linear("decoder.project_in", hidden)
        if self.spec.positions == "learned":
            places = rows.positions.long() + self.spec.position_offset
            table = self._tensors["decoder.embed_positions.weight"]
            hidden = hidden + ops.activations(embedding(places, table))
        return hidden

    def _block(
        self, name: str, hidden: Tensor, delta: Tensor | None, rows: Rows, cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        if delta is None:
            normed = self._norm(f"{name}.attn_norm", hidden)
        else:
            normed, hidden = self._add_norm(f"{name}.attn_norm", delta, hidden)
        delta = self._attention(name, normed, rows, cache)
        normed, hidden = self._add_norm(f"{name}.mlp_norm", delta, hidden)
        return hidden, self._mlp(name, normed)

    def _post_norm_block(
        self, name: str, hidden: Tensor, delta: Tensor | None, rows: Rows, cache: Tensor
    ) -> tuple[Tensor, None]:
        attended = self._attention(name, hidden, rows, cache)
        hidden, _ = self._add_norm(f"{name}.attn_norm", attended, hidden)
        hidden, _ = self._add_norm(f"{name}.mlp_norm", self._mlp(name, hidden), hidden)
        return hidden, None

    def _attention(self, name: str, x: Tensor, rows: Rows, cache: Tensor) -> Tensor:
        spec = self.spec
        q, k, v = self._linear(f"{name}.qkv", x).split(spec.qkv_splits, dim=-1)
        q = q.unflatten(-1, (spec.heads, spec.head_dim))
        k = k.unflatten(-1, (spec.kv_heads, spec.head_dim))
        v = v.unflatten(-1, (spec.kv_heads, spec.head_dim))
        if spec.qk_norm:
            q = ops.rms_norm(q, self._tensors[f"{name}.q_norm.weight"], spec.norm_eps)
            k = ops.rms_norm(k, self._tensors[f"{name}.k_norm.weight"], spec.norm_eps)
        if spec.rope is not None:
            cos, sin = self._tensors["rope_cos"], self._tensors["rope_sin"]
            q = ops.rope_append(q, k, v, cos, sin, rows.positions, cache, rows.slots)
        else:
            ops.kv_append(k, v, cache, rows.slots)
        attended = ops.paged_attention(
            q,
            cache,
            rows.block_tables,
            rows.kv_lengths,
            rows.first_rows,
            spec.attention_scale,
            self._tensors.get("alibi_slopes"),
            spec.sliding_window,
        )
        return self._linear(f"{name}.attn_out", attended.flatten(-2))

    def _mlp(self, name: str, x: Tensor) -> Tensor:
        layer, low_rank = self._layer(f"{name}.mlp_in")
        kind, gated = self.spec.activation, self.spec.gated_mlp
        activated = ops.linear_activation(x, *layer, kind, gated, *low_rank)
        return self._linear(f"{name}.mlp_out", activated)

    def _finish(self, hidden: Tensor, delta: Tensor | None) -> Tensor:
        if not self.spec.final_norm:
            hidden = hidden if delta is None else hidden + delta
        else:
            assert delta is not None  # a post-norm decoder has no final norm
            hidden, _ = self._add_norm("decoder.final_norm", delta, hidden)
        if self.spec.embed_dim != self.spec.hidden_size:
            hidden = self._linear("decoder.project_out", hidden)
        return hidden

    def _linear(self, name: str, x: Tensor) -> Tensor:
        layer, low_rank = self._layer(name)
        return ops.linear(x, *layer, *low_rank)

    def _layer(self, name: str) -> tuple[tuple[Tensor, Tensor | None], tuple[Any, ...]]:
        """(weight, bias), and the low-rank term's arguments where there is one."""
        layer = self._tensors[f"{name}.weight"], self._tensors.get(f"{name}.bias")
        lora_a = self._tensors.get(f"{name}.lora_a")
        if lora_a is None:
            return layer, ()
        adapter = self._adapters[name]
        return layer, (lora_a, self._tensors[f"{name}.lora_b"], adapter.scale, adapter.splits)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, eps = self._tensors[f"{name}.weight"], self.spec.norm_eps
        if self.spec.norm == "rms_norm":
            return ops.rms_norm(x, weight, eps)
        return ops.layer_norm(x, weight, self._tensors[f"{name}.bias"], eps)

    def _add_norm(self, name: str, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        weight, eps = self._tensors[f"{name}.weight"], self.spec.norm_eps
        if self.spec.norm == "rms_norm":
            return ops.add_rms_norm(x, residual, weight, eps)
        return ops.add_layer_norm(x, residual, weight, self._tensors[f"{name}.bias"], eps)


def activation_dtype(weights: torch.dtype, device: torch.device) -> torch.dtype:
    """Of the rows, and so of the cache: on the CPU bfloat16 weights meet float32 rows."""
    return torch.float32 if device.type == "cpu" else weights
