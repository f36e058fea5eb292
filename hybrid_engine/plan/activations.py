"""Activations of one packed pass, from the decoder's shape.

Counted in values a row, as `models/decoder.py` and the operators' ``setup_context`` keep them; the
test compares every count with what autograd saves. h hidden, q and kv the widths of queries and of
keys, F the MLP's inner width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_engine.models import DecoderSpec

from .models import ModelSize

HEAD_ROWS = 256  # `ops.linear_token_logprobs`: rows whose logits the backward computes together


@dataclass(frozen=True)
class PassShape:
    """Of the largest pass.

    Attributes:
        rows: packed tokens.
        scored: rows that a head reads.
    """

    rows: int
    scored: int


@dataclass(frozen=True)
class Activations:
    """Bytes of one pass of one model.

    Attributes:
        width: bytes of a value: 4 on the CPU, whatever the weights.
        dropout: adapters drop out, which keeps what they multiply, and a mask.
    """

    model: ModelSize
    shape: PassShape
    width: int = 4
    checkpointing: bool = False
    dropout: bool = False

    @property
    def spec(self) -> DecoderSpec:
        return self.model.spec

    def saved(self) -> int:
        """What the forward pass leaves for the backward."""
        spec, rows, scored = self.spec, self.shape.rows, self.shape.scored
        blocks = self.model.trained_blocks
        final = (2 * spec.hidden_size + 2) * scored if spec.final_norm else scored * spec.embed_dim
        if blocks == 0:
            return final * self.width
        if self.checkpointing:  # residual stream and delta enter each block
            return ((2 * blocks - 1) * spec.hidden_size * rows + final) * self.width
        kept = (blocks - 1) * self.block() + self.block(last=True) + final * self.width
        return kept - (self._entering() if self.model.lora_columns else 0)

    def block(self, last: bool = False) -> int:
        """What one block keeps; what follows the last one's attention runs on scored rows alone."""
        rows = self.shape.rows
        after = self.shape.scored if last else rows
        kept = rows * self._attention() + after * self._mlp()
        if last:
            kept += self.shape.scored * self.spec.q_size  # selected from the attention's output
        return kept * self.width

    def backward(self) -> int:
        """Most that a block's backward has beside what is saved, gradients of weights apart."""
        spec, rows = self.spec, self.shape.rows
        h, inner = spec.hidden_size, spec.intermediate_size
        wide = h + 2 * inner if spec.gated_mlp else h + inner
        again = self.block() if self.checkpointing else 0
        return rows * max(2 * h + inner, wide) * self.width + again

    def head(self) -> int:
        """Beside what is saved, when a language-model head's backward is at its largest."""
        spec, scored = self.spec, self.shape.scored
        logits = min(scored, HEAD_ROWS) * spec.vocab_size * self.width
        matrix = spec.vocab_size * spec.embed_dim * 4  # sums of its gradient are float32
        trained = self.model.head > 0
        half = self.model.itemsize < 4
        one = max(2 * logits, logits + (matrix if trained or half else 0))
        if half and trained:
            one = max(one, logits + matrix * 3 // 2)
        if scored <= HEAD_ROWS or not trained:
            return one
        return matrix + max(2 * logits, logits + matrix)

    def forward(self) -> int:
        """Most that a block has while nothing is kept."""
        spec = self.spec
        attention = 4 * spec.hidden_size + 3 * spec.q_size + 3 * spec.kv_size
        mlp = 5 * spec.hidden_size + sum(spec.mlp_in_splits) + spec.intermediate_size
        return self.shape.rows * max(attention, mlp) * self.width

    def _attention(self) -> int:
        """Residual stream and normed rows, q|k|v, rotated q and k, the output, and statistics."""
        spec = self.spec
        rotated = spec.q_size + spec.kv_size if spec.rope is not None else 0
        per_row = 2 * spec.hidden_size + sum(spec.qkv_splits) + rotated + spec.q_size + spec.heads
        per_row += 1 if spec.norm == "rms_norm" else 2
        if spec.qk_norm:
            per_row += spec.heads + spec.kv_heads
        if self.dropout:
            per_row += (
                spec.hidden_size + 5 * spec.q_size
            ) // 4  # masks; the output has two readers
        return per_row

    def _entering(self) -> int:
        """The first block's norm keeps nothing if neither it nor what it reads learns."""
        statistics = 1 if self.spec.norm == "rms_norm" else 2
        return (self.spec.hidden_size + statistics) * self.shape.rows * self.width

    def _mlp(self) -> int:
        """Residual stream and normed rows, what the activation reads and what it gives."""
        spec = self.spec
        per_row = 2 * spec.hidden_size + sum(spec.mlp_in_splits) + spec.intermediate_size
        per_row += 1 if spec.norm == "rms_norm" else 2
        if self.dropout:
            per_row += (spec.hidden_size + spec.intermediate_size) // 4
        return per_row
