"""Which rows of every parameter a rank of a tensor-parallel group reads; see csrc/engine/slices.h.

Every linear layer is cut by its outputs, the rows of its weight, so each output is one whole sum
in the order that a single rank would take: the same bits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hybrid_engine.errors import UserError
from hybrid_engine.models import DecoderSpec

Rows = tuple[tuple[int, int], ...]

_LINE = 16  # floats of a cache line: no two ranks write to one
_VOCAB_BLOCK = 64  # logits that the sampler reduces together (csrc/sampling/row.h)
_BLOCK = re.compile(r"^decoder\.blocks\.\d+\.")
_CUT = ("weight", "bias", "lora_b")


@dataclass(frozen=True)
class Slices:
    """Rank r of the group has ``[begins[r], begins[r + 1])`` of each kind of feature.

    Attributes:
        rank: in the group.
        heads: of the query heads; with each come the key-value heads that it looks at, which ranks
            may share.
        intermediate: of the MLP's inner features.
        hidden, embed: of the features of the residual stream and of the embedding, as outputs.
        vocab: of the vocabulary.
    """

    spec: DecoderSpec
    rank: int
    heads: tuple[int, ...]
    intermediate: tuple[int, ...]
    hidden: tuple[int, ...]
    embed: tuple[int, ...]
    vocab: tuple[int, ...]

    @property
    def ranks(self) -> int:
        """Of the group."""
        return len(self.heads) - 1

    def as_dict(self) -> dict[str, Any]:
        """For the C++ program."""
        names = ("heads", "intermediate", "hidden", "embed", "vocab")
        return {"rank": self.rank, **{name: list(getattr(self, name)) for name in names}}

    def rows(self, name: str) -> Rows | None:
        """Row ranges of a parameter that this rank reads, ascending; None: all of it."""
        layer, _, part = _BLOCK.sub("", name).rpartition(".")
        if part not in _CUT:
            return None
        if layer in ("decoder.embed_tokens", "head"):
            return (self._own(self.vocab),)
        if layer in ("attn_out", "mlp_out", "decoder.project_in"):
            return (self._own(self.hidden),)
        if layer == "decoder.project_out":
            return (self._own(self.embed),)
        if layer == "qkv":
            return self._qkv_rows()
        if layer == "mlp_in":
            begin, end = self._own(self.intermediate)
            splits, inner = len(self.spec.mlp_in_splits), self.spec.intermediate_size
            return tuple((begin + inner * i, end + inner * i) for i in range(splits))
        return None

    def cut(self, name: str, parameter: Tensor) -> Tensor | list[Tensor]:
        """This rank's rows, as views."""
        rows = self.rows(name)
        return parameter if rows is None else [parameter[begin:end] for begin, end in rows]

    def _own(self, begins: tuple[int, ...]) -> tuple[int, int]:
        return begins[self.rank], begins[self.rank + 1]

    def _qkv_rows(self) -> Rows:
        spec = self.spec
        group, width = spec.heads // spec.kv_heads, spec.head_dim
        first, end = self._own(self.heads)
        keys = (first // group * width, ((end - 1) // group + 1) * width)
        starts = (spec.q_size, spec.q_size + spec.kv_size)
        return (
            (first * width, end * width),
            *((start + keys[0], start + keys[1]) for start in starts),
        )


def slice_decoder(spec: DecoderSpec, rank: int, ranks: int) -> Slices:
    """Cuts as evenly as whole heads and cache lines allow.

    Raises:
        UserError: more ranks than heads.
    """
    if ranks > spec.heads:
        raise UserError(
            f"inference_tp is {ranks}, but the model has {spec.heads} attention heads, of which "
            f"every rank needs one; give {spec.heads} or less"
        )
    return Slices(
        spec,
        rank,
        heads=_cuts(spec.heads, ranks),
        intermediate=_cuts(spec.intermediate_size, ranks, _LINE),
        hidden=_cuts(spec.hidden_size, ranks, _LINE),
        embed=_cuts(spec.embed_dim, ranks, _LINE),
        vocab=_cuts(spec.vocab_size, ranks, _VOCAB_BLOCK),
    )


def _cuts(size: int, ranks: int, unit: int = 1) -> tuple[int, ...]:
    """``ranks + 1`` numbers that ascend from 0 to ``size``, between them multiples of ``unit``."""
    units = -(-size // unit)
    return tuple(min(size, units * rank // ranks * unit) for rank in range(ranks + 1))
