"""The frozen prefix that several models have in common: one storage, one computation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .packing import PackedBatch

if TYPE_CHECKING:
    from .heads import NativeModel


class Trunk(NamedTuple):
    """Hidden states of a batch as they enter block ``stop`` (post-residual)."""

    hidden: Tensor  # [T, h]
    stop: int


@torch.no_grad()
def compute_trunk(model: NativeModel, batch: PackedBatch, stop: int) -> Trunk:
    """Run embedding and blocks ``[0, stop)`` once, for every model that shares them."""
    decoder, batch = model.decoder, batch.to(model.device)
    return Trunk(decoder.run_blocks(decoder.embed(batch), batch, 0, stop), stop)


def frozen_blocks(model: NativeModel) -> int:
    """Number of leading blocks that, like everything before them, have nothing to train."""
    decoder = model.decoder
    before = [p for module in decoder.embedding_modules() for p in module.parameters()]
    if any(p.requires_grad for p in before):
        return 0
    for index, block in enumerate(decoder.blocks):
        if any(p.requires_grad for p in block.parameters()):
            return index
    return len(decoder.blocks)


@torch.no_grad()
def share_frozen_trunk(models: Sequence[NativeModel]) -> int:
    """Make models share the storage of equal frozen parameters; return how many blocks they share.

    The count is that of the common trunk: leading blocks (with the embedding before them) that are
    frozen in every model and equal byte for byte, so that ``compute_trunk`` of any of them serves
    all. Frozen parameters elsewhere (a reference's head and a policy's) share storage too.
    Call it before the models are given to a training engine: ZeRO-3 partitions each model's
    parameters on their own afterwards. A model that runs through transformers makes it 0.
    """
    if len(models) < 2 or any(not model.native for model in models):
        return 0
    first, others = models[0], models[1:]
    for other in others:
        _share_equal_parameters(first, other)
    if any(not _same_arithmetic(first, other) for other in others):
        return 0
    if not _one_storage([model.decoder.embedding_modules() for model in models]):
        return 0
    limit = min(frozen_blocks(model) for model in models)
    for index in range(limit):
        if not _one_storage([[model.decoder.blocks[index]] for model in models]):
            return index
    return limit


def _share_equal_parameters(first: nn.Module, other: nn.Module) -> None:
    ours = dict(first.named_parameters())
    for name, parameter in other.named_parameters():
        mine = ours.get(name)
        if mine is None or mine.requires_grad or parameter.requires_grad:
            continue
        if _equal_bytes(mine, parameter):
            parameter.data = mine.data


def _equal_bytes(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if a.data_ptr() == b.data_ptr():
        return True
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _same_arithmetic(a: NativeModel, b: NativeModel) -> bool:
    """Equal specs, up to what comes after the blocks."""
    after = {"tied_head", "final_norm", "vocab_size", "num_layers"}
    left, right = a.spec.as_dict(), b.spec.as_dict()
    return all(left[key] == right[key] for key in left if key not in after)


def _one_storage(parts: Sequence[Sequence[nn.Module]]) -> bool:
    """Whether every model's part (a list of modules) has the same parameters, in place."""

    def pointers(modules: Sequence[nn.Module]) -> list[tuple[str, int]]:
        return [
            (f"{index}.{name}", parameter.data_ptr())
            for index, module in enumerate(modules)
            for name, parameter in module.named_parameters()
        ]

    expected = pointers(parts[0])
    return all(pointers(part) == expected for part in parts[1:])
