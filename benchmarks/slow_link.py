"""A slower network than this machine's: collectives that arrive late."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass
class _Late:
    work: dist.Work
    arrival: float

    def wait(self) -> None:
        self.work.wait()
        time.sleep(max(0.0, self.arrival - time.perf_counter()))


@contextmanager
def slow_all_gathers(seconds: float) -> Iterator[None]:
    """An all-gather occupies the link for at least so long; it does one at a time."""
    fast, free_at = dist.all_gather_into_tensor, 0.0

    def slow(*arguments: Tensor, **options: Any) -> _Late:
        nonlocal free_at
        free_at = max(free_at, time.perf_counter()) + seconds
        return _Late(fast(*arguments, **options), free_at)

    dist.all_gather_into_tensor = slow
    try:
        yield
    finally:
        dist.all_gather_into_tensor = fast
