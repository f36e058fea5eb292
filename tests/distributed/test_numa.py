"""Nodes of the processors that a process may run on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hybrid_engine.distributed.numa import memory_nodes

LISTS = {0: "0-3,8-11\n", 1: "4-7,12-15\n", 2: "\n"}  # the last has memory alone


def system(root: Path) -> Path:
    for node, processors in LISTS.items():
        directory = root / f"sys/devices/system/node/node{node}"
        directory.mkdir(parents=True)
        (directory / "cpulist").write_text(processors)
    return root


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
@pytest.mark.parametrize(
    ("processors", "nodes"), [({0}, [0]), ({9, 3}, [0]), ({12}, [1]), ({3, 4}, [0, 1]), ({99}, [])]
)
def test_nodes_of_an_affinity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processors: set[int], nodes: list[int]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: processors)
    monkeypatch.delenv("OMP_PROC_BIND", raising=False)
    assert memory_nodes(system(tmp_path)) == nodes


def test_threads_that_openmp_binds_may_be_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    assert memory_nodes(system(tmp_path)) == [0, 1]


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert memory_nodes(tmp_path) == []
