"""What the GPU benchmarks time, run on the CPU: the same results from ours and from the peers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu_cases import CASES, PEERS, Scale
from hybrid_kernels import bench

SMALL = Scale(64, 96, 4, 2, 16, 300, 3, 128)


@pytest.mark.parametrize("name", CASES)
def test_ours_and_the_peers_compute_the_same(name: str) -> None:
    case = CASES[name](SMALL, "cpu", torch.float32)
    assert PEERS[name][0] in case.peers
    assert case.bytes > 0
    ours = case.ours()
    for peer in case.peers.values():
        if name == "sample":  # tokens drawn from another stream: only that they can be drawn
            assert 0 <= int(peer().min()) <= int(peer().max()) < SMALL.vocab
        else:
            torch.testing.assert_close(ours, peer(), rtol=1e-5, atol=1e-5)


class FakeEvent:
    """Tells time by a clock that only recording moves."""

    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = -1.0

    def record(self) -> None:
        FakeEvent.clock += 2.0
        self.at = FakeEvent.clock

    def synchronize(self) -> None:
        assert self.at >= 0

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


def test_a_gpu_is_timed_by_its_events_on_a_cold_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code that a GPU runs, on events of our own."""
    properties = SimpleNamespace(L2_cache_size=1024)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    plain_empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, device, **kind: plain_empty(*size, **kind).fill_(1)
    )
    called: list[Any] = []
    timer = bench.timer(lambda: called.append(timer._wash.any().item()), "cuda")
    for _ in range(3):
        timer.prepare()
        timer()
    assert timer._wash.numel() == 2048
    assert called == [False, False, False]  # the cache was washed before every call
    assert timer.median(2) == pytest.approx(2.0 / 1e3)
    assert len(timer.seconds) == 3
