"""Ranks that stand by until one of them has work for all, or all have gone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from hybrid_engine.distributed.collectives import describe_missing, rank, world_size
from hybrid_engine.distributed.process_group import initialise
from hybrid_engine.distributed.waiting import RankTimeout

_POLL_SECONDS = 0.002
_sessions = itertools.count(1)


class Standby:
    """One session, which every rank begins, behind a barrier, after the end of the last.

    It goes through the key-value store, because a collective would need to know when to begin.
    """

    def __init__(self, phase: str) -> None:
        self._world, self._phase = initialise(), phase
        self._number = next(_sessions)
        self._calls, self._gone = 0, False
        self._forget(self._gone_key(rank(), self._number - 1))

    def next(self, wants: Callable[[], bool], leaving: Callable[[], bool]) -> bool:
        """Returns True on all ranks once one of them wants the next piece of common work, or False
        on all once all have left.

        Args:
            wants: whether this rank does.
            leaving: whether it will want nothing any more.

        Raises:
            RankTimeout: neither happened.
        """
        limit = self._world.timeout.total_seconds()
        deadline = time.monotonic() + limit
        call = self._key(f"call/{self._calls}")
        while time.monotonic() < deadline:
            if wants():
                self._world.store.set(call, "1")
            elif leaving() and not self._gone:
                self._world.store.set(self._gone_key(rank(), self._number), "1")
                self._gone = True
            all_gone = self._gone and not self._present()  # before the call, that may come last
            called = self._world.store.check([call])
            if called or all_gone:
                self._forget(self._key(f"call/{self._calls - 1}"))  # everybody has answered it
                self._calls += 1
                return called
            time.sleep(_POLL_SECONDS)
        raise RankTimeout(describe_missing(self._world, self._present(), self._phase, limit))

    def _present(self) -> list[int]:
        """Ranks that have not left."""
        check = self._world.store.check
        return [r for r in range(world_size()) if not check([self._gone_key(r, self._number)])]

    def _key(self, name: str) -> str:
        return f"standby/{self._number}/{name}"

    def _gone_key(self, of_rank: int, number: int) -> str:
        return f"standby/{number}/gone/{of_rank}"

    def _forget(self, key: str) -> None:
        self._world.store.delete_key(key)
