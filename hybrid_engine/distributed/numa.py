"""Which memory is near: the NUMA nodes of the processors that this process may run on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def memory_nodes(root: Path = Path("/")) -> list[int]:
    """Numbers of the nodes, ascending; empty where the system does not tell.

    Args:
        root: of the file system that has ``sys``.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    own = os.sched_getaffinity(0)
    lists = (root / "sys/devices/system/node").glob("node[0-9]*/cpulist")
    return sorted(
        int(path.parent.name.removeprefix("node"))
        for path in lists
        if not own.isdisjoint(_processors(path.read_text()))
    )


def _processors(text: str) -> Iterator[int]:
    """Of a list such as ``0-3,8``."""
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)
