"""Where gathered weights lie while generating: in a copy of this rank's own, or in one that all
ranks of a host read.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from hybrid_engine.distributed.collectives import all_gather_json, barrier, rank
from hybrid_engine.distributed.device import compute_device
from hybrid_engine.distributed.shared_memory import note_shared, share_memory
from hybrid_engine.engine.arena import arena_on
from hybrid_engine.engine.gather_plan import GatherPlan, Part
from hybrid_engine.engine.gather_policy import GatherPolicy, Group, PartSizes
from hybrid_engine.engine.gradient_memory import GradientMemory
from hybrid_engine.engine.staging import (
    Arrival,
    StagedArrival,
    Words,
    staging_for,
    whole_pages,
)
from hybrid_kernels import ops


class OwnCopy:
    """Every rank has its own, or its slices, and lays out there what comes through a staging."""

    def __init__(
        self, plan: GatherPlan, policy: GatherPolicy, sizes: PartSizes, group: Group
    ) -> None:
        self._arena = arena_on(compute_device(), plan.size)
        self._staging = staging_for(policy, sizes, group)

    @property
    def storage(self) -> Tensor:
        """Bytes, laid out by the plan, at one address as long as the copy lasts."""
        return self._arena.storage

    @property
    def nbytes(self) -> int:
        """Held during a phase."""
        return self._arena.nbytes

    @property
    def staging_bytes(self) -> int:
        """Beside them while gathering."""
        return self._staging.nbytes

    def lend(self) -> None:
        """A phase begins, and other ranks may write to this one's memory."""

    def send(self, number: int, part: Part, rollout: int) -> StagedArrival:
        """Begins the collective that brings part ``number``, which has parameters."""
        return self._staging.send(number, part, rollout)

    def lay_out(self, part: Part, arrival: Arrival) -> None:
        """Puts what has arrived where it belongs."""
        assert isinstance(arrival, StagedArrival)
        ops.unshard_(self.storage, arrival.everyone, *part.runs)

    def end_gather(self) -> None:
        """All parts are there."""
        self._staging.release()

    def release(self, lost: bool) -> None:
        """The phase has ended: the memory goes back, the contents are lost.

        Args:
            lost: a rank is, so the others cannot be waited for.
        """
        self._arena.release()


class SharedCopy:
    """One for all ranks of a host. Each lays its own shards in, where its neighbours' follow, and
    a collective only has to say that they are there: nothing is read twice, nothing held twice.

    As far as possible it lies where the ranks keep their gradients, one rank's memory behind the
    other's: training needs that when generating has ended, and so it takes no memory at all. The
    rest is taken for a phase and given back.

    Args:
        plan: of whole parameters, pinned.
        gradients: of this rank; every rank has as much, ``group.lent``.
    """

    staging_bytes = 0

    def __init__(self, plan: GatherPlan, group: Group, gradients: GradientMemory | None) -> None:
        own = whole_pages(group.lent)
        self._lent = own * group.ranks
        self._size = max(self._lent, whole_pages(plan.size))
        pages, _ = share_memory(self._size, rank() == 0, all_gather_json)
        assert pages is not None
        self._pages = pages
        self._memory = torch.frombuffer(pages, dtype=torch.uint8)
        self.storage = self._memory[: plan.size]
        self.nbytes = max(0, plan.size - self._lent) // group.ranks
        self._gradients = gradients if group.lent else None
        if self._gradients is not None:
            self._gradients.move_to(self._memory[own * rank() :][: group.lent])
        self._words = Words(group.ranks)
        self._others = group.ranks - 1

    def lend(self) -> None:
        """As `OwnCopy.lend`."""
        if self._gradients is not None:
            self._gradients.lend()

    def send(self, number: int, part: Part, rollout: int) -> Arrival:
        """As `OwnCopy.send`."""
        for piece in part.pieces:
            begin, count = piece.own_range(rank())
            at = piece.offset + begin
            shard = piece.shard().view(1, -1)
            ops.unshard_(self.storage, shard, [0], [piece.part], [0], [count], [at])
        return Arrival(self._words.send(), self._others * part.shard_size)

    def lay_out(self, part: Part, arrival: Arrival) -> None:
        """It lies there already."""

    def end_gather(self) -> None:
        """As `OwnCopy.end_gather`: there was nothing beside it."""

    def release(self, lost: bool) -> None:
        """As `OwnCopy.release`, when no rank reads it any more."""
        if lost:
            return
        note_shared()
        barrier("leaving generation")
        kept = self._lent if self._lies_with_gradients() else 0
        if rank() == 0 and self._size > kept:
            self._pages.madvise(mmap.MADV_REMOVE, kept, self._size - kept)
        if self._gradients is not None:
            self._gradients.take_back()

    def _lies_with_gradients(self) -> bool:
        """Unless another copy has them by now, of a second engine for generation."""
        return self._gradients is not None and self._gradients.lies_in(self._memory)


GatheredCopy = OwnCopy | SharedCopy
