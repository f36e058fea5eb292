"""Where every parameter lies: in the ranks' shards, and in the arena that it is gathered into.

Parameters travel as bytes, so float32 and bfloat16 share a collective.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hybrid_engine.distributed.device import compute_device
from hybrid_engine.engine.gather_policy import GatherPolicy, PartSizes
from hybrid_engine.engine.slices import Rows, Slices
from hybrid_engine.errors import UserError
from hybrid_engine.models import CausalLM

_BLOCK = re.compile(r"decoder\.blocks\.(\d+)\.")
_BEFORE_BLOCKS = ("decoder.embed_tokens.", "decoder.embed_positions.", "decoder.project_in.")
_ALIGNMENT = 64  # bytes: parameters begin at a cache line


@dataclass(frozen=True)
class Piece:
    """One parameter.

    Attributes:
        part: bytes of the flattened parameter on each rank; the last ranks' end in padding.
        offset: the first byte in the arena of what is kept of it; streamed ones share theirs.
        rows: the rows that are kept; None: all of it.
    """

    parameter: Any
    part: int
    offset: int
    rows: Rows | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return sum(end - begin for begin, end in self.kept)

    @property
    def kept(self) -> list[tuple[int, int]]:
        """Ranges of bytes of the flattened parameter that are kept."""
        whole = self.parameter.ds_numel * self.dtype.itemsize
        if self.rows is None:
            return [(0, whole)]
        row = whole // self.parameter.ds_shape[0]
        return [(begin * row, end * row) for begin, end in self.rows]

    def own_range(self, rank: int) -> tuple[int, int]:
        """Where the part of a rank begins in the flattened parameter, and its bytes without the
        padding.
        """
        whole = self.parameter.ds_numel * self.dtype.itemsize
        begin = min(whole, rank * self.part)
        return begin, min(self.part, whole - begin)

    def shard(self) -> Tensor:
        """The bytes of this rank's part, where DeepSpeed has it now."""
        return self.parameter.ds_tensor.view(torch.uint8)

    def whole(self, arena: Tensor) -> Tensor:
        """The parameter in the arena, where all of it is kept."""
        flat = arena[self.offset : self.offset + self.size].view(self.dtype)
        return flat.view(self.parameter.ds_shape)

    def view(self, arena: Tensor) -> Tensor | list[Tensor]:
        """The parameter in the arena, or what is kept of it, row range by row range."""
        if self.rows is None:
            return self.whole(arena)
        flat = arena[self.offset : self.offset + self.size].view(self.dtype)
        kept = flat.view(-1, *self.parameter.ds_shape[1:])
        return list(kept.split([end - begin for begin, end in self.rows]))


@dataclass(frozen=True)
class Part:
    """What one collective brings: the parameters before, of, or behind the blocks."""

    pieces: tuple[Piece, ...]

    @property
    def shard_size(self) -> int:
        """Bytes on each rank."""
        return sum(piece.part for piece in self.pieces)

    @cached_property
    def runs(self) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
        """Arguments of `unshard_`: columns, parts, starts, sizes and offsets of what is kept."""
        runs, column = [], 0
        for piece in self.pieces:
            offset = piece.offset
            for begin, end in piece.kept:
                runs.append((column, piece.part, begin, end - begin, offset))
                offset += end - begin
            column += piece.part
        columns, parts, starts, sizes, offsets = map(list, zip(*runs, strict=True))
        return columns, parts, starts, sizes, offsets


@dataclass(frozen=True)
class GatherPlan:
    """The parts in the order in which a forward pass needs them.

    Attributes:
        names: every parameter name with its piece; tied parameters share theirs.
        size: bytes of the arena.
    """

    parts: tuple[Part, ...]
    names: dict[str, Piece]
    size: int


def part_sizes(model: CausalLM, world_size: int, slices: Slices | None = None) -> PartSizes:
    """Of a model as for :func:`plan_gather`."""
    parts = _pieces(model, world_size, slices)
    return PartSizes(
        tuple(sum(aligned(piece.size) for piece in part.values()) for part in parts),
        tuple(sum(piece.part for piece in part.values()) for part in parts),
    )


def plan_gather(
    model: CausalLM, world_size: int, policy: GatherPolicy, slices: Slices | None = None
) -> GatherPlan:
    """One part for the embedding, one a block, one for what follows. What is pinned lies in the
    arena one part after another; behind it is the ring.

    Args:
        model: partitioned by DeepSpeed's ZeRO-3 over ``world_size`` ranks.
        slices: what is kept of every parameter; None: everything.

    Raises:
        UserError: shards that cannot be read.
    """
    sizes, slots = part_sizes(model, world_size, slices), policy.slots()
    in_ring = {block + 1: slot for block, slot in slots.items()}
    ring = sum(size for number, size in enumerate(sizes.kept) if number not in in_ring)
    pieces: dict[Any, Piece] = {}
    parts, pinned_end = [], 0
    for number, unplaced in enumerate(_pieces(model, world_size, slices)):
        if number in in_ring:
            start = ring + in_ring[number] * policy.ring_bytes(sizes)
        else:
            start, pinned_end = pinned_end, pinned_end + sizes.kept[number]
        placed = _placed(unplaced, start)
        parts.append(Part(tuple(placed.values())))
        pieces |= placed
    every_name = model.named_parameters(remove_duplicate=False)
    names = {name: pieces[parameter] for name, parameter in every_name}
    return GatherPlan(
        tuple(parts), names, ring + len(set(slots.values())) * policy.ring_bytes(sizes)
    )


def _pieces(model: CausalLM, world_size: int, slices: Slices | None) -> list[dict[Any, Piece]]:
    """Of every part, by parameter; they have no place yet."""
    parts: list[dict[Any, Piece]] = [{} for _ in range(model.spec.num_layers + 2)]
    for name, parameter in model.named_parameters():
        shard = shard_of(name, parameter, world_size)
        rows = slices.rows(name) if slices else None
        part = parts[part_of(name, model.spec.num_layers)]
        part[parameter] = Piece(parameter, shard.nbytes, 0, rows)
    return parts


def _placed(pieces: dict[Any, Piece], start: int) -> dict[Any, Piece]:
    """One after another."""
    placed = {}
    for parameter, piece in pieces.items():
        placed[parameter] = replace(piece, offset=start)
        start += aligned(piece.size)
    return placed


def aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def part_of(name: str, num_layers: int) -> int:
    """Numbers as in csrc/engine/weight_gate.h."""
    if name.startswith(_BEFORE_BLOCKS):
        return 0
    block = _BLOCK.match(name)
    return int(block[1]) + 1 if block else num_layers + 1


def shard_of(name: str, parameter: Any, world_size: int) -> Tensor:
    """This rank's part of a parameter that ZeRO-3 has cut over ``world_size`` ranks, flat.

    Raises:
        UserError: it is stored in another way than plainly, on the device that computes.
    """
    shard, expected = parameter.ds_tensor, -(-parameter.ds_numel // world_size)
    here = compute_device().type
    plain = shard.dtype == parameter.dtype and shard.device.type == here
    if not plain or shard.numel() != expected:
        found = f"{shard.numel()} x {str(shard.dtype).removeprefix('torch.')}"
        wanted = f"{expected} x {str(parameter.dtype).removeprefix('torch.')}"
        raise UserError(
            f"generation under ZeRO-3 reads plain shards on the device that computes ({here}), but "
            f"that of {name} is {found} on {shard.device.type} where {wanted} are expected; leave "
            "zero_quantized_nontrainable_weights and, on GPUs, offload_param out of the DeepSpeed "
            "configuration"
        )
    return shard
