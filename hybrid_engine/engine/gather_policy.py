"""How much of a model in shards stays while generating: everything, or as many layers as fit, with
the rest streamed through a ring in every pass.

One number decides, the bytes that gathered weights may take; tensor-parallel slices count as the
slices that they are, but one copy for all ranks of a host has everything. Nothing here touches a
model or a machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hybrid_engine.errors import UserError

SETTING = "weight_bytes"
WORD_BYTES = 8  # in every collective of a policy that streams: the rollout that a rank is in
_RING = 2  # layers: one in use, one being laid out
_AHEAD_PINNED, _AHEAD_STREAMING = 4, 2


@dataclass(frozen=True)
class PartSizes:
    """Of what precedes the blocks, of every block, and of what follows them.

    Attributes:
        kept: bytes that this rank reads of each.
        shards: bytes that each rank sends of it.
    """

    kept: tuple[int, ...]
    shards: tuple[int, ...]

    @property
    def blocks(self) -> int:
        return len(self.kept) - 2


@dataclass(frozen=True)
class GatherPolicy:
    """What stays, and what comes anew for every pass.

    Attributes:
        blocks: layers of the model.
        pinned: of them stay, as do the embedding and the head.
        ring: places that the others take in turn.
        ahead: collectives on their way at a time. More than one, because a message's way through
            the threads of Gloo takes milliseconds where all cores compute.
    """

    blocks: int
    pinned: int
    ring: int = _RING
    ahead: int = _AHEAD_STREAMING

    @property
    def streamed(self) -> tuple[int, ...]:
        """Blocks that are streamed, spread evenly, so that each has others to hide behind."""
        count, blocks = self.blocks - self.pinned, self.blocks
        return tuple(i for i in range(blocks) if (i + 1) * count // blocks > i * count // blocks)

    @property
    def streams(self) -> bool:
        return self.pinned < self.blocks

    @property
    def word_bytes(self) -> int:
        return WORD_BYTES if self.streams else 0

    def shares_copy(self, group: Group) -> bool:
        """Whether one copy of the weights serves all ranks: what is streamed comes to each in its
        own time.
        """
        return group.one_copy and not self.streams

    def slots(self) -> dict[int, int]:
        """The place in the ring of every block that is streamed: always the same, so that pointers
        into it stay."""
        return {block: number % self.ring for number, block in enumerate(self.streamed)}

    def ring_bytes(self, sizes: PartSizes) -> int:
        """Bytes of one place."""
        return max((sizes.kept[block + 1] for block in self.streamed), default=0)

    def held_bytes(self, sizes: PartSizes, group: Group) -> int:
        """Weights and what is on its way, at the most. Of one copy for all ranks, this one's part,
        without what lies in memory that is lent.
        """
        if self.shares_copy(group):
            return max(0, sum(sizes.shards) - group.lent)
        streamed = set(self.streamed)
        kept = sum(
            size for part, size in enumerate(sizes.kept) if part - 1 not in streamed
        ) + self.ring_bytes(sizes) * (self.ring if streamed else 0)
        return kept + sum(staging_bytes(self, sizes, group))

    def pass_bytes(self, sizes: PartSizes, group: Group) -> int:
        """What a rank receives in every pass: (ranks - 1) times the streamed shards, each with its
        word."""
        shards = (sizes.shards[block + 1] + WORD_BYTES for block in self.streamed)
        return (group.ranks - 1) * sum(shards)


@dataclass(frozen=True)
class Group:
    """The ranks that have the shards.

    Attributes:
        shared_memory: they reach each other's memory.
        one_copy: and it is as near to all of them: they read one copy of what stays.
        lent: bytes of it that each rank has and does not need while generating.
    """

    ranks: int
    shared_memory: bool = False
    one_copy: bool = False
    lent: int = 0

    @property
    def copies(self) -> int:
        """Of a shard on its way, on each rank: what it sends, and what it gets of everyone's; or
        what it shows to the others."""
        return 1 if self.shared_memory else 1 + self.ranks


def staging_slots(policy: GatherPolicy, group: Group) -> int:
    """Blocks that are on their way at a time, or not yet laid out by every rank. A rank begins a
    collective when it has laid out what came ``ahead`` of it; so where one comes, all ranks have
    laid out what came twice as far ahead, give or take a part without parameters.
    """
    return 2 * policy.ahead + 1 if group.shared_memory else policy.ahead


def staging_bytes(policy: GatherPolicy, sizes: PartSizes, group: Group) -> tuple[int, int]:
    """Of the blocks that are on their way, and of the embedding and the head."""
    if policy.shares_copy(group):
        return 0, 0
    widest = max(sizes.shards[1:-1], default=0) + policy.word_bytes
    ends = sizes.shards[0] + sizes.shards[-1] + 2 * policy.word_bytes
    return group.copies * staging_slots(policy, group) * widest, group.copies * ends


def pinning_all(blocks: int) -> GatherPolicy:
    return GatherPolicy(blocks, pinned=blocks, ring=0, ahead=_AHEAD_PINNED)


def solve(
    sizes: PartSizes, group: Group, weight_bytes: int, *, at_least: bool = False
) -> GatherPolicy:
    """The policy that streams least of those that fit into ``weight_bytes``.

    Args:
        at_least: where none fits, take the one that holds least instead of refusing.

    Raises:
        UserError: none fits.
    """
    leanest = pinning_all(sizes.blocks)
    for policy in _candidates(sizes.blocks):
        held = policy.held_bytes(sizes, group)
        if held <= weight_bytes:
            return policy
        if held < leanest.held_bytes(sizes, group):
            leanest = policy
    if at_least:
        return leanest
    raise UserError(
        f"{SETTING} is {weight_bytes}, but generating under ZeRO-3 on {group.ranks} ranks takes at "
        f"least {leanest.held_bytes(sizes, group)} bytes of weights, with {leanest.pinned} of "
        f"{leanest.blocks} layers kept and the others streamed; give so much, or more ranks that "
        "generate together (inference_tp)"
    )


def solve_together(
    everyone: Sequence[PartSizes], group: Group, budgets: Sequence[int], *, at_least: bool = False
) -> GatherPolicy:
    """What fits on every rank, because a streamed layer is one for all of them."""
    policies = (
        solve(sizes, group, budget, at_least=at_least)
        for sizes, budget in zip(everyone, budgets, strict=True)
    )
    return min(policies, key=lambda policy: policy.pinned)


def _candidates(blocks: int) -> Iterator[GatherPolicy]:
    """From all layers kept to none. To stream no more layers than the ring has places saves
    nothing. Where a round ends with the place that the next one begins with, the first layer of a
    pass cannot come ahead of it, so such numbers are passed over.
    """
    yield pinning_all(blocks)
    for pinned in range(blocks - _RING - 1, -1, -1):
        if pinned == 0 or (blocks - pinned) % _RING != 1:
            yield GatherPolicy(blocks, pinned)


def describe(
    policy: GatherPolicy,
    sizes: PartSizes,
    group: Group,
    weight_bytes: int | None,
    inference_tp: int,
) -> str:
    """One line: what stays, what is streamed, what it takes of ``weight_bytes``, if they count."""
    held = _mib(policy.held_bytes(sizes, group))
    if weight_bytes is not None:
        held += f" of at most {_mib(weight_bytes)}"
    sliced = f" (1/{inference_tp} of each)" if inference_tp > 1 else ""
    if policy.shares_copy(group):
        return (
            f"generation keeps all {policy.blocks} layers once gathered, in one copy for "
            f"{group.ranks} ranks: {held} a rank beside {_mib(min(group.lent, sum(sizes.shards)))} "
            "where gradients lie in training"
        )
    if not policy.streams:
        return f"generation keeps all {policy.blocks} layers{sliced} once gathered: {held}"
    return (
        f"generation keeps {policy.pinned} of {policy.blocks} layers{sliced} and streams "
        f"{policy.blocks - policy.pinned} through {policy.ring} places: {held}; "
        f"{_mib(policy.pass_bytes(sizes, group))} to receive a pass"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
