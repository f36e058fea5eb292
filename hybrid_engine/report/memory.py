"""The peak of memory in every phase, as the machine saw it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import psutil
import torch

from hybrid_engine.distributed.device import compute_device
from hybrid_engine.distributed.env import rank_env
from hybrid_engine.distributed.shared_memory import most_shared, resident_shared

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_SAMPLING_SECONDS = 0.01


class Gauge(Protocol):
    """A high-water mark that can be set back."""

    how: str

    def reset(self) -> None: ...
    def peak(self) -> int: ...


class KernelGauge:
    """The kernel's own mark of this process's resident memory (Linux). What the ranks of a host
    share is resident in each, and counts by its part.
    """

    how = "resident memory, the kernel's high-water mark"

    def __init__(self) -> None:
        self._ranks = rank_env().local_world_size

    def reset(self) -> None:
        most_shared(forget=True)
        _CLEAR_REFS.write_text("5")

    def peak(self) -> int:
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        if "VmHWM" not in fields:
            raise OSError(f"{_STATUS} has no VmHWM")
        return int(fields["VmHWM"].split()[0]) * 1024 - _of_others(most_shared(), self._ranks)


def _of_others(shared: int, ranks: int) -> int:
    """The part of the other ranks in pages that all of this host have."""
    return shared - shared // ranks


class SampledGauge:
    """Resident memory, looked at 100 times a second by a thread, where the mark cannot be set
    back: it may miss what is held for less.
    """

    how = "resident memory, sampled 100 times a second"

    def __init__(self) -> None:
        self._process, self._ranks = psutil.Process(), rank_env().local_world_size
        self._most = 0
        thread = threading.Thread(target=self._watch, name="memory-gauge", daemon=True)
        self._stop = threading.Event()
        thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLING_SECONDS):
            self._most = max(self._most, self._now())

    def _now(self) -> int:
        resident = int(self._process.memory_info().rss)
        return resident - _of_others(resident_shared(), self._ranks)

    def reset(self) -> None:
        self._most = self._now()

    def peak(self) -> int:
        self._most = max(self._most, self._now())
        return self._most


class GpuGauge:
    """What tensors of this rank take of its GPU, by torch's allocator."""

    how = "tensors on the GPU, torch's allocator"

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()


def gauge_here() -> Gauge:
    """The best that this machine has."""
    if compute_device().type == "cuda":
        return GpuGauge()
    try:
        gauge = KernelGauge()
        gauge.reset()
        gauge.peak()
        return gauge
    except OSError:
        return SampledGauge()


class PhasePeaks:
    """The peak of every phase of a stage so far, in bytes. Phases may nest; an inner one's peak is
    the outer one's, too.
    """

    def __init__(self, gauge: Gauge | None = None) -> None:
        self._gauge = gauge
        self._running: list[int] = []  # each phase's peak until an inner one began
        self._recent: dict[str, int] = {}  # since the last take()
        self.bytes: dict[str, int] = {}

    @property
    def how(self) -> str:
        return self._open().how

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._mark()
        self._running.append(0)
        try:
            yield
        finally:
            self._mark()
            peak = self._running.pop()
            for peaks in (self.bytes, self._recent):
                peaks[name] = max(peaks.get(name, 0), peak)

    def end_stage(self) -> None:
        """What runs from now on, before the next stage begins too, belongs to the next."""
        self.bytes, self._recent = {}, {}

    def take(self) -> dict[str, int]:
        """Peaks since the last call."""
        recent, self._recent = self._recent, {}
        return recent

    def _mark(self) -> None:
        gauge = self._open()
        peak = gauge.peak() if self._running else 0
        self._running = [max(before, peak) for before in self._running]
        gauge.reset()

    def _open(self) -> Gauge:
        if self._gauge is None:
            self._gauge = gauge_here()
        return self._gauge
