"""Where DeepSpeed's optimizers keep the values that are trained, parameter by parameter.

In every ZeRO stage they are stretches of flattened parameters, and differ in who holds which:

    stage 0, fp32     the parameters themselves, whole on every rank
    stage 0, half     fp32 copies of them, whole on every rank
    stages 1 and 2    a rank's stretch of all parameters laid end to end
    stage 3           a rank's shard of each parameter

AdamW's moments lie beside them, in tensors of the same shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hybrid_engine.distributed.parts import Part, PartReader
from hybrid_engine.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")


class Piece(NamedTuple):
    """A stretch of a parameter that this rank updates.

    Attributes:
        name: of the parameter.
        start: index of its first element in the flattened parameter.
        size: elements.
        owner: the tensor that the optimizer updates: the parameter, or many laid end to end.
        offset: index of the first element in the flattened `owner`.
        everywhere: every rank updates it alike.
    """

    name: str
    start: int
    size: int
    owner: Tensor
    offset: int
    everywhere: bool

    def part(self, values: Tensor) -> Part:
        """The piece of a tensor shaped like `owner`."""
        flat = values.detach().view(-1)[self.offset : self.offset + self.size]
        return Part(self.start, flat, self.everywhere)


def pieces_of(module: nn.Module, optimizer: Any) -> list[Piece]:
    """What this rank updates. `optimizer` is the DeepSpeed engine's."""
    names = {p: name for name, p in module.named_parameters() if p.requires_grad}
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(_shards(names, optimizer))
    if hasattr(optimizer, "bit16_groups"):
        return list(_stretches(names, optimizer.single_partition_of_fp32_groups))
    if hasattr(optimizer, "bf16_groups"):
        return list(_stretches(names, optimizer.fp32_groups_flat_partition))
    if hasattr(optimizer, "fp32_groups"):
        return list(_copies(names, optimizer))
    return [Piece(name, 0, p.numel(), p, 0, True) for p, name in names.items()]


def _copies(names: dict[nn.Parameter, str], optimizer: Any) -> Iterator[Piece]:
    for trained, copies in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for parameter, copy in zip(trained, copies, strict=True):
            yield Piece(names[parameter], 0, copy.numel(), copy, 0, True)


def _stretches(names: dict[nn.Parameter, str], groups: list[Tensor]) -> Iterator[Piece]:
    for parameter, name in names.items():
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:  # else other ranks have all of it
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            owner = groups[mapping.param_group_index]
            yield Piece(name, here.start, here.numel, owner, there.start, False)


def _shards(names: dict[nn.Parameter, str], optimizer: Any) -> Iterator[Piece]:
    for parameter, name in names.items():
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start, count = shard_of(parameter)
        if count:
            owner = optimizer.fp32_partitioned_groups_flat[group]
            yield Piece(name, start, count, owner, offset, False)


def shard_of(parameter: Any) -> tuple[int, int]:
    """Start and count of this rank's shard of a ZeRO-3 parameter, without the padding."""
    size = parameter.ds_tensor.ds_numel
    start = size * torch.distributed.get_rank(parameter.ds_process_group)
    return start, max(0, min(size, parameter.ds_numel - start))


def parts_to_write(pieces: list[Piece], adamw: torch.optim.AdamW) -> dict[str, Part]:
    """Values, moments and step counts under `value/NAME`, `exp_avg/NAME`, ..., `step/NAME`."""
    parts = {}
    for piece in pieces:
        parts[f"value/{piece.name}"] = piece.part(piece.owner)
        state = adamw.state.get(piece.owner)
        if state:  # it has made a step
            parts |= {f"{kind}/{piece.name}": piece.part(state[kind]) for kind in MOMENTS}
            step = torch.as_tensor(state["step"], dtype=torch.float32).reshape(1)
            parts[f"step/{piece.name}"] = Part(0, step, piece.everywhere)
    return parts


@torch.no_grad()
def read_into(pieces: list[Piece], adamw: torch.optim.AdamW, saved: PartReader) -> None:
    """Puts saved values and moments, of whatever ranks and ZeRO stage, where this rank has them.

    Raises:
        UserError: something was not saved, or cannot be had under this ZeRO stage.
    """
    steps: dict[Tensor, set[float]] = {piece.owner: set() for piece in pieces}
    for owner in steps:
        _reset(adamw, owner)
    for piece in pieces:
        saved.fill(f"value/{piece.name}", piece.part(piece.owner))
        step = torch.zeros(1)
        if f"step/{piece.name}" in saved:
            saved.fill(f"step/{piece.name}", Part(0, step))
            for kind in MOMENTS:
                saved.fill(f"{kind}/{piece.name}", piece.part(adamw.state[piece.owner][kind]))
        steps[piece.owner].add(float(step))
    for owner, counts in steps.items():
        if len(counts) > 1:
            raise UserError(
                f"{saved.directory}: some parameters have made {min(counts):.0f} optimizer steps "
                f"and others {max(counts):.0f}, which only ZeRO stage 0 can keep apart; resume "
                "under that"
            )
        adamw.state[owner]["step"].fill_(counts.pop())


def _reset(adamw: torch.optim.AdamW, owner: Tensor) -> None:
    """Moments as before the first step, in the tensors that are there already."""
    state = adamw.state[owner]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(owner, memory_format=torch.preserve_format)
    state["step"].zero_()
    for kind in MOMENTS:
        state[kind].zero_()
