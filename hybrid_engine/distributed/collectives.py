"""The few messages that ranks exchange besides gradients: sums, moments, small objects, barriers.

Every function is the identity (or returns at once) in a process that is alone, so callers need no
special case. Objects travel as JSON, never as pickles.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hybrid_engine.distributed.process_group import World, current_world
from hybrid_engine.distributed.waiting import RankTimeout, last_seen, waiting
from hybrid_engine.rl.largest import largest
from hybrid_engine.rl.moments import combine_moments


def rank() -> int:
    world = current_world()
    return world.env.rank if world else 0


def world_size() -> int:
    world = current_world()
    return world.env.world_size if world else 1


def is_main() -> bool:
    return rank() == 0


def all_gather_tensor(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Stack one equally shaped CPU tensor of every rank (of ``group``): [...] -> [ranks, ...], in
    rank order."""
    if world_size() == 1:
        return tensor.unsqueeze(0)
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    with waiting("an exchange of numbers"):
        dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)


def all_gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """One JSON-able value of every rank (of ``group``), in rank order."""
    if world_size() == 1:
        return [value]
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = all_gather_tensor(torch.tensor([payload.numel()]), group)[:, 0].tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: payload.numel()] = payload
    rows = all_gather_tensor(padded, group)
    return [json.loads(bytes(row[:size].tolist())) for row, size in zip(rows, sizes, strict=True)]


def broadcast_json(value: Any, source: int = 0) -> Any:
    """The source rank's JSON-able value, on every rank; others may pass None."""
    if world_size() == 1:
        return value
    encoded = json.dumps(value).encode() if rank() == source else b""
    size = torch.tensor([len(encoded)])
    with waiting("a broadcast"):
        dist.broadcast(size, source)
        payload = torch.empty(int(size), dtype=torch.uint8)
        if rank() == source:
            payload.copy_(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
        dist.broadcast(payload, source)
    return json.loads(bytes(payload.tolist()))


def all_reduce_sums(sums: dict[str, float]) -> dict[str, float]:
    """Add dictionaries of floats over ranks, in float64 and in rank order.

    A key that only some ranks have counts as zero on the others, so a rank without work takes part
    with an empty dictionary.
    """
    total: dict[str, float] = {}
    for part in all_gather_json(sums):
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def all_reduce_max(value: float) -> float:
    """The largest of every rank's values; nan if one of them is."""
    return largest(all_gather_json(value))


def all_reduce_moments(moments: torch.Tensor) -> torch.Tensor:
    """Combine (count, mean, sum of squared deviations), float64 [3], exactly over ranks."""
    return combine_moments(all_gather_tensor(moments.cpu()))


# Numbers of the next barriers, by who meets there.
_barriers: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.count(1))
_POLL_SECONDS = 0.002


def enter_phase(phase: str) -> None:
    """Record what this rank has begun, for the messages of ranks that wait for it."""
    world = current_world()
    if world is not None and world.env.world_size > 1:
        world.store.set(f"phase/{world.env.rank}", phase)


def barrier(
    phase: str, timeout: timedelta | None = None, members: Sequence[int] | None = None
) -> None:
    """Wait until every rank (of ``members``) has come to its n-th barrier, as this one has.

    It goes through the key-value store instead of a collective: when a rank is missing, the others
    can still say which one, and where it was last seen.

    Raises:
        RankTimeout: after `timeout` (default: that of the process group).
    """
    world = current_world()
    if world is None or world.env.world_size == 1:
        return
    enter_phase(phase)
    everyone = range(world.env.world_size) if members is None else members
    place, own = f"barrier/{everyone[0]}-{everyone[-1]}", world.env.rank
    number = next(_barriers[place])
    world.store.set(f"{place}/{number}/{own}", phase)
    limit = (timeout or world.timeout).total_seconds()
    deadline = time.monotonic() + limit
    missing = [r for r in everyone if r != own]
    while missing := [r for r in missing if not world.store.check([f"{place}/{number}/{r}"])]:
        if time.monotonic() > deadline:
            raise RankTimeout(describe_missing(world, missing, phase, limit))
        time.sleep(_POLL_SECONDS)
    # Whoever is here has seen all of the previous barrier: its keys have served.
    world.store.delete_key(f"{place}/{number - 1}/{own}")


def describe_missing(world: World, missing: list[int], phase: str, limit: float) -> str:
    seen = [last_seen(world, r) for r in missing]
    return (
        f"rank {world.env.rank} waited {limit:.0f} s at {phase!r} for {', '.join(seen)}; "
        "look at that rank's output for the cause"
    )
