"""Memory that processes of one host share."""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any


def share_memory(
    nbytes: int, creates: bool, gather_json: Callable[[Any], list[Any]]
) -> tuple[mmap.mmap | None, list[int]]:
    """``nbytes`` bytes, zero at first, that all processes of a group map; a collective of them.

    It has no name in a file system, and lives as long as a process has it. A container's limit on
    ``/dev/shm`` does not concern it.

    Args:
        creates: whether this process brings it: one of the group does.
        gather_json: one JSON-able value of every process, in order.

    Returns:
        The memory, or None where this process cannot reach it; and who cannot, by place in the
        group: they are on another host, or may not look into each other's files.
    """
    descriptor, own = _create(nbytes) if creates else (-1, None)
    source = next(said for said in gather_json(own) if said is not None)
    pages = _map(source, nbytes)
    reached = gather_json(pages is not None)
    if creates:
        os.close(descriptor)
    return pages, [at for at, found in enumerate(reached) if not found]


_most_noted = 0


def note_shared() -> None:
    """To be called before shared pages are given back: what is resident of them now is part of
    this process's peak, and other processes have it too.
    """
    global _most_noted
    _most_noted = max(_most_noted, resident_shared())


def most_shared(forget: bool = False) -> int:
    """Bytes of shared pages that this process had resident at most, of the moments that were noted
    and this one.

    Args:
        forget: what was noted before.
    """
    global _most_noted
    if forget:
        _most_noted = 0
    return max(_most_noted, resident_shared())


def resident_shared() -> int:
    """Bytes of shared pages that this process has resident; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = (line.split()[1] for line in lines if line.startswith("RssShmem:"))
    return int(next(found, "0")) * 1024


def _create(nbytes: int) -> tuple[int, list[str]]:
    name = f"hybrid-engine-{secrets.token_hex(8)}"
    descriptor = os.memfd_create(name)
    os.truncate(descriptor, nbytes)
    return descriptor, [f"/proc/{os.getpid()}/fd/{descriptor}", name]


def _map(source: list[str], nbytes: int) -> mmap.mmap | None:
    path, name = source
    try:
        # On another host that path, if any, leads to something else.
        if name not in os.readlink(path):
            return None
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        return mmap.mmap(descriptor, max(nbytes, 1))
    finally:
        os.close(descriptor)
