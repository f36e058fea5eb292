"""Memory that goes back to the operating system and keeps its address."""

from __future__ import annotations

from pathlib import Path

import torch

from hybrid_engine.engine.arena import Arena


def resident_bytes(address: int) -> int:
    """Memory behind the mapping that holds an address, as the kernel counts it."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "Rss:":
            return int(line.split()[1]) * 1024
    raise AssertionError("no mapping holds the address")


def test_release_returns_the_pages_and_keeps_the_address() -> None:
    arena = Arena(32 << 20)
    address, view = arena.storage.data_ptr(), arena.storage[3:7]
    for value in (1, 2):
        arena.storage.fill_(value)
        assert resident_bytes(address) >= arena.nbytes
        arena.release()
        assert resident_bytes(address) < arena.nbytes // 100
        assert arena.storage.data_ptr() == address
        view += value
        assert torch.equal(view, torch.full((4,), value, dtype=torch.uint8)), (
            "released memory reads as zero"
        )


def test_an_empty_arena() -> None:
    arena = Arena(0)
    arena.release()
    assert (arena.storage.numel(), arena.nbytes) == (0, 0)
