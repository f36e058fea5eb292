"""The decoder as a training module: the same arithmetic, in the same order, as the C++ program.

Residual additions happen inside the norms: between blocks travel the residual stream ``hidden``
and the last layer's output ``delta``, which the next norm adds. There is no dropout but that of
LoRA adapters, which reinforcement learning goes without: log-probabilities of sampled tokens must
be those of the network that sampled them.

ZeRO-3 gathers a module's own parameters around that module's forward, so every fused operator
here reads the parameters of one module only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hybrid_engine.errors import UserError
from hybrid_kernels import ops
from hybrid_kernels.nn import LayerNorm, Linear, RMSNorm

from .packing import PackedBatch
from .rope import rope_tables
from .spec import DecoderSpec
from .trunk import Trunk


class AttentionContext(NamedTuple):
    """What every block's attention needs to know about the batch."""

    batch: PackedBatch
    cos: Tensor | None  # [P, rotary_dim / 2], rotary only
    sin: Tensor | None
    alibi_slopes: Tensor | None  # [H], ALiBi only


class Block(nn.Module):
    """Attention and MLP with their norms. Shapes: hidden and delta ``[T, h]``."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        h, attended = spec.hidden_size, spec.q_size
        self.spec = spec
        self.attn_norm = _norm(spec)
        self.qkv = Linear(h, sum(spec.qkv_splits), bias=spec.qkv_bias, splits=spec.qkv_splits)
        if spec.qk_norm:
            self.q_norm = RMSNorm(spec.head_dim, eps=spec.norm_eps)
            self.k_norm = RMSNorm(spec.head_dim, eps=spec.norm_eps)
        self.attn_out = Linear(attended, h, bias=spec.attn_out_bias)
        self.mlp_norm = _norm(spec)
        self.mlp_in = Linear(
            h, sum(spec.mlp_in_splits), bias=spec.mlp_bias, splits=spec.mlp_in_splits
        )
        self.mlp_out = Linear(spec.intermediate_size, h, bias=spec.mlp_bias)

    def forward(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        context: AttentionContext,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """With ``rows [N]`` only these come out: what follows attention is computed for them
        alone.
        """
        if self.spec.norm_position == "post":
            hidden, _ = self.attn_norm(self.attend(hidden, context, rows), _select(hidden, rows))
            hidden, _ = self.mlp_norm(self.mlp(hidden), hidden)
            return hidden, None
        if delta is None:
            normed = self.attn_norm(hidden)
        else:
            normed, hidden = self.attn_norm(delta, hidden)
        normed, hidden = self.mlp_norm(self.attend(normed, context, rows), _select(hidden, rows))
        return hidden, self.mlp(normed)

    def attend(self, x: Tensor, context: AttentionContext, rows: Tensor | None = None) -> Tensor:
        """Self-attention of normalised rows ``[T, h]`` -> ``[T, h]``, or ``[N, h]`` at ``rows``."""
        spec = self.spec
        q, k, v = self.qkv(x).split(spec.qkv_splits, dim=-1)
        q = q.unflatten(-1, (spec.heads, spec.head_dim))
        k = k.unflatten(-1, (spec.kv_heads, spec.head_dim))
        v = v.unflatten(-1, (spec.kv_heads, spec.head_dim))
        if spec.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.cos is not None and context.sin is not None:
            q, k = ops.rope(q, k, context.cos, context.sin, context.batch.positions)
        q, k, v = (context.batch.at_places(x) for x in (q, k, v))
        attended = ops.attention(
            q,
            k,
            v,
            context.batch.cu_seqlens,
            spec.attention_scale,
            alibi_slopes=context.alibi_slopes,
            window=spec.sliding_window,
        )
        attended = _select(context.batch.at_rows(attended), rows)
        return self.attn_out(attended.flatten(-2))

    def mlp(self, x: Tensor) -> Tensor:
        """Feed-forward of normalised rows ``[T, h]`` -> ``[T, h]``."""
        wide, kind = self.mlp_in(x), self.spec.activation
        if self.spec.gated_mlp:
            return self.mlp_out(ops.gated_activation(wide, kind))
        return self.mlp_out(ops.bias_activation(wide, None, kind))


class Decoder(nn.Module):
    """Embedding, blocks, final norm: packed tokens ``[T]`` -> hidden states of any rows."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.embed_dim)
        if spec.positions == "learned":
            rows = spec.max_positions + spec.position_offset
            self.embed_positions = nn.Embedding(rows, spec.hidden_size)
        if spec.embed_dim != spec.hidden_size:
            self.project_in = Linear(spec.embed_dim, spec.hidden_size, bias=False)
            self.project_out = Linear(spec.hidden_size, spec.embed_dim, bias=False)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))
        if spec.final_norm:
            self.final_norm = _norm(spec)

    def forward(
        self, batch: PackedBatch, trunk: Trunk | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the last norm, ready for a head: ``[N, embed_dim]`` at packed rows
        ``rows [N]``, or all ``[T, embed_dim]``.

        ``trunk`` replaces embedding and blocks ``[0, trunk.stop)``, which must be frozen.
        """
        if trunk is None:
            trunk = Trunk(self.embed(batch), 0)
        else:
            self._check_trunk(batch, trunk)
        hidden, delta = self._run(trunk.hidden, batch, trunk.stop, self.spec.num_layers, rows)
        return self._finish(hidden, delta)

    def embed(self, batch: PackedBatch) -> Tensor:
        """Hidden states ``[T, h]`` entering block 0."""
        self._check_length(batch)
        hidden = ops.activations(self.embed_tokens(batch.input_ids))
        if self.spec.embed_dim != self.spec.hidden_size:
            hidden = self.project_in(hidden)
        if self.spec.positions == "learned":
            rows = batch.positions.long() + self.spec.position_offset
            hidden = hidden + ops.activations(self.embed_positions(rows))
        return hidden

    def run_blocks(self, hidden: Tensor, batch: PackedBatch, start: int, stop: int) -> Tensor:
        """Blocks ``[start, stop)``: hidden states entering ``start`` -> those entering ``stop``."""
        hidden, delta = self._run(hidden, batch, start, stop)
        return hidden if delta is None else hidden + delta

    def embedding_modules(self) -> list[nn.Module]:
        """The modules that run before block 0."""
        names = ("embed_tokens", "embed_positions", "project_in")
        return [getattr(self, name) for name in names if hasattr(self, name)]

    def _run(
        self,
        hidden: Tensor,
        batch: PackedBatch,
        start: int,
        stop: int,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if start == stop:
            return _select(hidden, rows), None
        context = self._context(batch)
        delta: Tensor | None = None
        for index in range(start, stop):
            block, wanted = self.blocks[index], rows if index == stop - 1 else None
            if self._recomputes(block):
                hidden, delta = checkpoint(
                    block, hidden, delta, context, wanted, use_reentrant=False
                )
            else:
                hidden, delta = block(hidden, delta, context, wanted)
        return hidden, delta

    def _finish(self, hidden: Tensor, delta: Tensor | None) -> Tensor:
        if not self.spec.final_norm:
            hidden = hidden if delta is None else hidden + delta
        elif delta is None:
            hidden = self.final_norm(hidden)
        else:
            hidden, _ = self.final_norm(delta, hidden)
        if self.spec.embed_dim != self.spec.hidden_size:
            hidden = self.project_out(hidden)
        return hidden

    def _context(self, batch: PackedBatch) -> AttentionContext:
        cos = sin = slopes = None
        device = batch.input_ids.device
        if self.spec.rope is not None:
            length = max(batch.longest, 1)
            cos, sin = rope_tables(self.spec.rope, length, self.spec.max_positions, device)
        elif self.spec.positions == "alibi":
            slopes = alibi_slopes(self.spec.heads).to(device)
        return AttentionContext(batch, cos, sin, slopes)

    def _recomputes(self, block: nn.Module) -> bool:
        """Frozen blocks at the bottom keep no activations, so there is nothing to recompute."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return False
        return any(p.requires_grad for p in block.parameters())

    def _check_length(self, batch: PackedBatch) -> None:
        if batch.longest > self.spec.max_positions:
            raise UserError(
                f"a sequence of {batch.longest} tokens exceeds the model's context of "
                f"{self.spec.max_positions}; shorten the prompt or the response"
            )

    def _check_trunk(self, batch: PackedBatch, trunk: Trunk) -> None:
        expected = (batch.num_tokens, self.spec.hidden_size)
        if tuple(trunk.hidden.shape) != expected:
            got = list(trunk.hidden.shape)
            raise ValueError(f"trunk.hidden has shape {got}; expected {list(expected)}")
        skipped = [*self.embedding_modules(), *self.blocks[: trunk.stop]]
        if any(p.requires_grad for module in skipped for p in module.parameters()):
            raise ValueError(
                f"trunk.stop is {trunk.stop}, but a parameter before that block is trainable"
            )


def alibi_slopes(heads: int) -> Tensor:
    """Slopes of ALiBi, fp32 ``[H]`` (Press et al. 2022, arXiv:2108.12409, and its official code).

    For a power of two the geometric series from 2^(-8/H); otherwise the series of the power of
    two below, continued with every other slope of the one above.
    """

    def series(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / count) for i in range(count)]

    below = 2 ** math.floor(math.log2(heads))
    return torch.tensor(series(below) + series(2 * below)[0::2][: heads - below])


def _select(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values.index_select(0, rows)


def _norm(spec: DecoderSpec) -> nn.Module:
    kind = RMSNorm if spec.norm == "rms_norm" else LayerNorm
    return kind(spec.hidden_size, eps=spec.norm_eps)
