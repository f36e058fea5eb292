"""Benchmarks that state work, not only time.

A case declares the bytes it moves and the operations it does; the result holds GB/s and GFLOP/s,
and each as a fraction of what this machine reached in the same run. The rates are in
pytest-benchmark's ``extra_info``, hence in its JSON.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class MachineLimits:
    """What plain large operations reach here with torch's current threads."""

    read_gb_per_s: float
    gflop_per_s: float


def bench(
    benchmark: Any,
    fn: Callable[[], Any],
    *,
    bytes: int = 0,
    flops: int = 0,
    device: str = "cpu",
    rounds: int = 30,
    baseline: Callable[[], Any] | None = None,
) -> None:
    """Times ``fn`` with pytest-benchmark and stores its rates.

    Args:
        benchmark: pytest-benchmark's fixture.
        fn: the call to time, without arguments.
        bytes: what it must read and write at least.
        flops: its floating-point operations.
        device: where it runs. On ``"cuda"`` the device's own events tell the time, and caches are
            emptied before every call.
        rounds: single calls to time; rates are computed from the median.
        baseline: another way to do the same, timed before every single call of ``fn``, so that a
            busy moment of the machine meets both; ``speedup`` is the ratio of the medians.
    """
    ours, theirs = timer(fn, device), timer(baseline or _nothing, device)

    def before() -> None:
        if baseline is not None:
            theirs.prepare()
            theirs()
        ours.prepare()

    benchmark.pedantic(ours, setup=before, rounds=rounds, iterations=1, warmup_rounds=3)
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = ours.median(rounds)
    benchmark.extra_info.update(rates(seconds, bytes, flops, machine_limits(device)))
    if baseline is not None:
        median = theirs.median(rounds)
        benchmark.extra_info["baseline_seconds"] = median
        benchmark.extra_info["speedup"] = round(median / seconds, 3)


class Timer:
    """Calls a function and keeps how long each call took."""

    def __init__(self, fn: Callable[[], Any]) -> None:
        self._fn = fn
        self.seconds: list[float] = []

    def prepare(self) -> None:
        """Before a call; not timed."""

    def __call__(self) -> None:
        self.seconds.append(_seconds(self._fn))

    def median(self, rounds: int) -> float:
        """Of the last ``rounds`` calls: those before were to warm up."""
        return statistics.median(self.seconds[-rounds:])


class CudaTimer(Timer):
    """The same by the GPU's events, between which nothing but the call runs, on a cold L2 cache."""

    def __init__(self, fn: Callable[[], Any]) -> None:
        super().__init__(fn)
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._wash = torch.empty(2 * properties.L2_cache_size, dtype=torch.int8, device="cuda")
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def prepare(self) -> None:
        self._wash.zero_()

    def __call__(self) -> None:
        self._start.record()
        self._fn()
        self._end.record()
        self._end.synchronize()
        self.seconds.append(self._start.elapsed_time(self._end) / 1e3)


def timer(fn: Callable[[], Any], device: str) -> Timer:
    return CudaTimer(fn) if device == "cuda" else Timer(fn)


def _nothing() -> None:
    """In place of a baseline that nobody asked for."""


def rates(seconds: float, bytes: int, flops: int, limits: MachineLimits) -> dict[str, float]:
    """GB/s and GFLOP/s of the work done in ``seconds``, and their fractions of the limits."""
    info: dict[str, float] = {}
    if bytes:
        info["gb_per_s"] = bytes / seconds / 1e9
        info["fraction_of_read"] = info["gb_per_s"] / limits.read_gb_per_s
    if flops:
        info["gflop_per_s"] = flops / seconds / 1e9
        info["fraction_of_sgemm"] = info["gflop_per_s"] / limits.gflop_per_s
    return {name: round(value, 4) for name, value in info.items()}


@functools.cache
def machine_limits(device: str = "cpu") -> MachineLimits:
    """Measures the limits once a process: reading 512 MiB, and a float32 product of size 2048."""
    stream = torch.ones(1 << 27, device=device)
    size = 2048
    a, b = torch.randn(2, size, size, device=device)
    out = torch.empty_like(a)
    read = _best_seconds(_synchronised(stream.sum, device))
    product = _best_seconds(_synchronised(lambda: torch.mm(a, b, out=out), device))
    return MachineLimits(
        read_gb_per_s=stream.numel() * stream.element_size() / read / 1e9,
        gflop_per_s=2 * size**3 / product / 1e9,
    )


def _best_seconds(run: Callable[[], Any], rounds: int = 5) -> float:
    run()
    return min(_seconds(run) for _ in range(rounds))


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _synchronised(fn: Callable[[], Any], device: str) -> Callable[[], Any]:
    if device == "cpu":
        return fn

    def run() -> None:
        fn()
        torch.accelerator.synchronize()

    return run
