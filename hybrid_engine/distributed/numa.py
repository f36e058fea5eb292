"""Which memory is near: NUMA nodes, of this system or of the processors that a process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# With these OpenMP binds threads one by one, this one already when its library is loaded, so a
# thread's mask says nothing of the process.
_BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def memory_nodes(root: Path = Path("/")) -> list[int]:
    """Numbers of the nodes that this process may compute on, ascending; empty where the system does
    not tell.

    Args:
        root: of the file system that has ``sys``.
    """
    nodes = system_nodes(root)
    if not hasattr(os, "sched_getaffinity") or any(name in os.environ for name in _BINDING):
        return sorted(nodes)
    own = os.sched_getaffinity(0)
    return sorted(node for node, processors in nodes.items() if own & processors)


def system_nodes(root: Path = Path("/")) -> dict[int, set[int]]:
    """The nodes that have processors, with their numbers."""
    lists = (root / "sys/devices/system/node").glob("node[0-9]*/cpulist")
    nodes = {
        int(path.parent.name.removeprefix("node")): set(_processors(path.read_text()))
        for path in lists
    }
    return {node: processors for node, processors in nodes.items() if processors}


def _processors(text: str) -> Iterator[int]:
    """Of a list such as ``0-3,8``."""
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)
