"""Free memory, as control groups of either version leave it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybrid_engine.engine.free_memory import free_memory

HOST = 8 * 2**30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "proc/meminfo", f"MemTotal: 99 kB\nMemAvailable:   {HOST // 1024} kB\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def group(path: Path, limit: str, used: int, cache: int, version: int) -> None:
    names = {1: ("limit_in_bytes", "usage_in_bytes"), 2: ("max", "current")}[version]
    for name, value in zip(names, (limit, used), strict=True):
        write(path / f"memory.{name}", f"{value}\n")
    write(path / "memory.stat", f"anon 5\ninactive_file {cache}\n")


def test_the_host_alone(root: Path) -> None:
    assert free_memory(root) == HOST
    assert 0 < free_memory() < 2**50


def test_the_tightest_group_on_the_way_up_decides(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/job/step\n")
    top = root / "sys/fs/cgroup"
    group(top / "job/step", "max", 100, 0, 2)
    assert free_memory(root) == HOST
    group(top / "job", "3000", 1200, 200, 2)
    assert free_memory(root) == 3000 - 1200 + 200
    group(top, "2000", 1900, 0, 2)  # where a container has its own limit at the root
    assert free_memory(root) == 100
    group(top, "2000", 2100, 0, 2)
    assert free_memory(root) == 0


def test_version_1(root: Path) -> None:
    write(root / "proc/self/cgroup", "4:memory:/job\n2:cpu,cpuacct:/job\n")
    group(root / "sys/fs/cgroup/memory/job", "5000", 1000, 0, 1)
    assert free_memory(root) == 4000
