"""Where shards are on their way from rank to rank.

Between hosts, or GPUs, an all-gather delivers everyone's to each. Ranks of one host lay theirs into
memory that all of them read, and the all-gather has nothing to bring but the word that they are
there: no byte goes through a socket, and each is laid out straight from where its owner put it.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hybrid_engine.distributed.collectives import all_gather_json, rank
from hybrid_engine.distributed.device import compute_device, weights_backend
from hybrid_engine.distributed.numa import memory_nodes
from hybrid_engine.distributed.process_group import initialise
from hybrid_engine.distributed.shared_memory import note_shared, share_memory
from hybrid_engine.engine.arena import arena_on
from hybrid_engine.engine.gather_plan import Part
from hybrid_engine.engine.gather_policy import (
    GatherPolicy,
    Group,
    PartSizes,
    staging_bytes,
    staging_slots,
)


@dataclass(frozen=True)
class Arrival:
    """A part's shards, once :meth:`wait` returns.

    Attributes:
        received_bytes: from other ranks.
    """

    work: dist.Work
    received_bytes: int

    def wait(self) -> None:
        self.work.wait()


@dataclass(frozen=True)
class StagedArrival(Arrival):
    """The same, to be laid out elsewhere.

    Attributes:
        everyone: ``[ranks, bytes of a shard and its word]``.
    """

    everyone: Tensor
    word_bytes: int

    @staticmethod
    def of(everyone: Tensor, work: dist.Work, word_bytes: int) -> StagedArrival:
        return StagedArrival(work, everyone[1:].nbytes, everyone, word_bytes)

    def words(self) -> list[int]:
        """The rollout that each rank was in when it sent this, or NOBODY."""
        words: list[int] = (
            self.everyone[:, -self.word_bytes :].contiguous().view(torch.int64)[:, 0].tolist()
        )
        return words


class Words:
    """Collectives that bring nothing: this rank has written what it shows to the others."""

    def __init__(self, ranks: int) -> None:
        self._ranks, self._said = ranks, torch.empty(1, dtype=torch.uint8)
        self._dist = _own_group()

    def send(self) -> dist.Work:
        """All ranks have, when it is done."""
        heard = torch.empty(self._ranks, dtype=torch.uint8)
        return dist.all_gather_into_tensor(heard, self._said, group=self._dist, async_op=True)


NOBODY = 0  # reads


class Places:
    """Where parts are within a staging of blocks, in turn, and of embedding and head behind them,
    which come once. In bytes of one shard, and its word."""

    def __init__(self, policy: GatherPolicy, sizes: PartSizes, group: Group) -> None:
        blocks, ends = staging_bytes(policy, sizes, group)
        self.word = policy.word_bytes
        self.size = (blocks + ends) // group.copies
        self._slots = staging_slots(policy, group)
        self._slot = blocks // group.copies // self._slots
        self._ends = {0: self._slot * self._slots}
        self._ends[len(sizes.shards) - 1] = self._ends[0] + sizes.shards[0] + self.word
        self._sent = 0  # blocks

    def take(self, number: int) -> int:
        """Where part ``number`` begins that is to be sent now."""
        if number in self._ends:
            return self._ends[number]
        self._sent += 1
        return self._sent % self._slots * self._slot

    def fill(self, own: Tensor, part: Part, rollout: int) -> None:
        """This rank's shard, and the rollout that it is in."""
        torch.cat([piece.shard() for piece in part.pieces], out=own[: part.shard_size])
        if self.word:
            own[part.shard_size :] = torch.tensor([rollout]).view(torch.uint8)


class Staging:
    """Every rank's shards as an all-gather delivers them, and this rank's as it takes them."""

    def __init__(self, policy: GatherPolicy, sizes: PartSizes, group: Group) -> None:
        self._places = Places(policy, sizes, group)
        self._copies = group.copies
        self._arena = arena_on(compute_device(), group.copies * self._places.size)
        self._dist = _own_group()

    @property
    def nbytes(self) -> int:
        return self._arena.nbytes

    def send(self, number: int, part: Part, rollout: int) -> StagedArrival:
        """Begins the collective that brings part ``number``, which has parameters."""
        width = part.shard_size + self._places.word
        start = self._copies * self._places.take(number)
        buffer = self._arena.storage[start : start + self._copies * width]
        own, everyone = buffer[:width], buffer[width:]
        self._places.fill(own, part, rollout)
        work = dist.all_gather_into_tensor(everyone, own, group=self._dist, async_op=True)
        return StagedArrival.of(everyone.view(-1, width), work, self._places.word)

    def release(self) -> None:
        """The memory goes back; all that was sent has arrived here."""
        self._arena.release()


class SharedStaging:
    """Every rank's shards where it shows them to the others."""

    def __init__(
        self, policy: GatherPolicy, sizes: PartSizes, group: Group, pages: mmap.mmap
    ) -> None:
        self._places = Places(policy, sizes, group)
        self._pages = pages
        self._shown = torch.frombuffer(pages, dtype=torch.uint8).view(group.ranks, -1)
        self._words = Words(group.ranks)

    @staticmethod
    def size(policy: GatherPolicy, sizes: PartSizes, group: Group) -> int:
        """Bytes of memory to share: whole pages for each rank, which gives back its own."""
        return group.ranks * whole_pages(Places(policy, sizes, group).size)

    @property
    def nbytes(self) -> int:
        return self._places.size

    def send(self, number: int, part: Part, rollout: int) -> StagedArrival:
        """As `Staging.send`."""
        width, start = part.shard_size + self._places.word, self._places.take(number)
        everyone = self._shown[:, start : start + width]
        self._places.fill(everyone[rank()], part, rollout)
        return StagedArrival.of(everyone, self._words.send(), self._places.word)

    def release(self) -> None:
        """The memory goes back when all ranks have read it."""
        note_shared()
        self._words.send().wait()
        size = self._shown[0].nbytes
        self._pages.madvise(mmap.MADV_REMOVE, rank() * size, size)


def shards_group(gradients: int = 0) -> Group:
    """All ranks, and what they have of each other's memory; a collective of them.

    Args:
        gradients: bytes that this rank could lend.
    """
    env = initialise().env
    if compute_device().type != "cpu" or env.local_world_size < env.world_size:
        return Group(env.world_size)
    _, missing = share_memory(1, rank() == 0, all_gather_json)
    said = all_gather_json([memory_nodes(), gradients])
    near = len({node for nodes, _ in said for node in nodes}) <= 1
    return Group(
        env.world_size,
        shared_memory=not missing,
        one_copy=near and not missing,
        lent=gradients if all(lent == gradients for _, lent in said) else 0,
    )


def staging_for(policy: GatherPolicy, sizes: PartSizes, group: Group) -> Staging | SharedStaging:
    """A collective of all ranks."""
    if not group.shared_memory:
        return Staging(policy, sizes, group)
    size = SharedStaging.size(policy, sizes, group)
    pages, _ = share_memory(size, rank() == 0, all_gather_json)
    assert pages is not None
    return SharedStaging(policy, sizes, group, pages)


def _own_group() -> dist.ProcessGroup:
    """Its collectives are ordered among themselves, whatever the main thread sends meanwhile."""
    return dist.new_group(backend=weights_backend(), timeout=initialise().timeout)


def whole_pages(size: int) -> int:
    """Rounded up."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
