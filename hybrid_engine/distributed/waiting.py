"""Errors of collectives, told as who waited where for whom."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from hybrid_engine.distributed.process_group import World, current_world

# How Gloo says that a peer has not come, or is gone.
_SIGNS = ("Timed out", "timeout", "Connection closed", "Connection reset", "Broken pipe")
_PATIENCE_SECONDS = 5.0  # for the others that waited for the same rank: they give up together
_POLL_SECONDS = 0.02


class RankTimeout(RuntimeError):
    """Some ranks did not arrive; the message names them and the phase they were last seen in."""


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Wraps collectives, DeepSpeed's own among them, which name neither rank nor phase.

    Raises:
        RankTimeout: in place of an error by which Gloo reports a peer that is late or lost.
    """
    try:
        yield
    except RankTimeout:
        raise
    except RuntimeError as error:
        world = current_world()
        if world is None or world.env.world_size == 1 or not any(s in str(error) for s in _SIGNS):
            raise
        raise RankTimeout(_describe(world, what)) from error


def _describe(world: World, what: str) -> str:
    """Whoever has waited says so in the store; the rank that does not was waited for."""
    own = world.env.rank
    others = [r for r in range(world.env.world_size) if r != own]
    begin = f"rank {own} waited in vain at {what!r}"
    try:
        world.store.set(f"waited/{own}", what)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while others and time.monotonic() < deadline:
            others = [r for r in others if not world.store.check([f"waited/{r}"])]
            time.sleep(_POLL_SECONDS)
        missing = ", ".join(last_seen(world, r) for r in others)
    except RuntimeError:
        return f"{begin}, and cannot reach rank 0's host, where it would learn for whom"
    return f"{begin} for {missing or 'ranks that waited, too'}; look at its output for the cause"


def last_seen(world: World, of_rank: int) -> str:
    """A rank, and what it had begun when it last said so."""
    key = f"phase/{of_rank}"
    last = world.store.get(key).decode() if world.store.check([key]) else "its start"
    return f"rank {of_rank} (last seen at {last!r})"
