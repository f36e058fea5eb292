"""Memory that a process may still take: what the host has, within what its control group allows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def free_memory(root: Path = Path("/")) -> int:
    """Bytes. Page cache counts as free, for it gives way.

    Args:
        root: of the file system that has ``proc`` and ``sys``.
    """
    left = [limit - used for limit, used in control_groups(root)]
    return max(0, min([_available(root / "proc/meminfo"), *left]))


def _available(meminfo: Path) -> int:
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def control_groups(root: Path = Path("/")) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of every control group that this process is in and that limits it, up
    to the root; version 1 or 2. Page cache that gives way does not count as used.
    """
    groups, mount = root / "proc/self/cgroup", root / "sys/fs/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, used = mount, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, used = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # Inside a container the group's own path may be hidden, and its files lie at the root.
        own = Path(path.strip("/"))
        for group in (own, *own.parents):
            limited = _limited(top / group, limit, used)
            if limited is not None:
                yield limited


def _limited(group: Path, limit: str, used: str) -> tuple[int, int] | None:
    try:
        most = (group / limit).read_text().strip()
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        taken = int((group / used).read_text()) - int(statistics.get("inactive_file", 0))
    except OSError:
        return None
    return None if most == "max" else (int(most), taken)
