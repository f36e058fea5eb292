"""A CUDA graph's stand-in: records operators with the very tensors that they read and wrote, and
does the same to the same memory again.

What a graph cannot do shows here too: a value that the host looked at while recording is an error,
and a tensor that is somewhere else at the second run is not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS_ON_THE_HOST = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._done: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in _READS_ON_THE_HOST:
            raise RuntimeError(f"{func} waits for the device inside a recorded step")
        result = func(*args, **(kwargs or {}))
        self._done.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, first in self._done:
            for old, new in zip(
                tree_leaves(first), tree_leaves(func(*args, **kwargs)), strict=True
            ):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeRecorder:
    """A `Recorder` that counts."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, step: Any) -> Any:
        self.recorded += 1
        tape = Tape()
        step()
        with tape:
            output = step()

        def replay() -> torch.Tensor:
            self.replayed += 1
            tape.replay()
            return output

        return replay


class FakeCuda:
    """As much of ``torch.cuda`` as recording needs, on tapes; notes what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.tapes: list[Tape] = []

    def graph_pool_handle(self) -> str:
        return "pool"

    def Stream(self) -> FakeStream:
        return FakeStream("side", self.calls)

    def current_stream(self) -> FakeStream:
        return FakeStream("main", self.calls)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.calls.append(f"on {stream.name}")
        yield
        self.calls.append("off")

    def CUDAGraph(self) -> Tape:
        self.tapes.append(Tape())
        return self.tapes[-1]

    @contextmanager
    def graph(self, tape: Tape, pool: str, capture_error_mode: str) -> Iterator[None]:
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        self.calls.append("record")
        with tape:
            yield


class FakeStream:
    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self._calls = name, calls

    def wait_stream(self, other: FakeStream) -> None:
        self._calls.append(f"{self.name} waits for {other.name}")
