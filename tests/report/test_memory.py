"""Peaks of phases, by every gauge."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from hybrid_engine.distributed.shared_memory import note_shared
from hybrid_engine.report.memory import Gauge, KernelGauge, PhasePeaks, SampledGauge

MEGABYTE = 1_000_000


class Scripted:
    """A gauge whose peak a test sets."""

    how = "scripted"

    def __init__(self) -> None:
        self.value = 0

    def reset(self) -> None:
        self.value = 0

    def peak(self) -> int:
        return self.value


def test_an_inner_phases_peak_is_the_outer_ones_too() -> None:
    gauge = Scripted()
    peaks = PhasePeaks(gauge)
    with peaks.phase("outer"):
        gauge.value = 5
        with peaks.phase("inner"):
            gauge.value = 9
        gauge.value = 7
    assert peaks.bytes == {"outer": 9, "inner": 9}
    with peaks.phase("inner"):
        gauge.value = 3
    assert peaks.bytes["inner"] == 9
    assert peaks.take() == {"outer": 9, "inner": 9}
    assert peaks.take() == {}


def test_nothing_of_a_stage_belongs_to_the_next() -> None:
    gauge = Scripted()
    peaks = PhasePeaks(gauge)
    with peaks.phase("evaluate"):
        gauge.value = 9
    peaks.end_stage()
    with peaks.phase("load"):  # of the next one, which has not begun yet
        gauge.value = 4
    with peaks.phase("evaluate"):
        gauge.value = 5
    assert peaks.bytes == {"load": 4, "evaluate": 5}


@pytest.mark.parametrize("kind", [KernelGauge, SampledGauge])
def test_a_tensor_that_is_gone_has_been_seen(kind: type[Gauge]) -> None:
    if kind is KernelGauge and not Path("/proc/self/clear_refs").exists():
        pytest.skip("Linux's /proc is not there")
    gauge = kind()
    gauge.reset()
    before = gauge.peak()
    tensor = torch.ones(50 * MEGABYTE // 4)
    held = gauge.peak()
    del tensor
    assert 49 * MEGABYTE < held - before < 60 * MEGABYTE
    assert gauge.peak() > held - MEGABYTE  # the kernel counts pages in batches
    gauge.reset()
    assert gauge.peak() < held - 40 * MEGABYTE


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_what_ranks_of_a_host_share_counts_by_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, size = 4, 40 * MEGABYTE
    names = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "RANK": 0, "LOCAL_RANK": 0}
    for name, value in {**names, "MASTER_PORT": 1234}.items():
        monkeypatch.setenv(name, str(value))
    gauge = KernelGauge()
    gauge.reset()
    before = gauge.peak()
    with mmap.mmap(-1, size) as pages:  # anonymous and shared
        pages.write(b"1" * size)
        gauge.reset()
        held = gauge.peak() - before
        note_shared()  # they are about to go
    afterwards = gauge.peak() - before
    for found in (held, afterwards):
        assert size // ranks - MEGABYTE < found < size // ranks + 5 * MEGABYTE
