"""Work that is recorded once and repeated: a CUDA graph on a GPU, a plain call elsewhere.

A recorder is given a function without arguments that reads and writes tensors at fixed addresses,
and returns one that does the same again and brings the same output tensor, whose contents are new.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Step = Callable[[], Tensor]


class Recorder(Protocol):
    def __call__(self, step: Step) -> Step: ...


def run_each_time(step: Step) -> Step:
    """No recording: where there is no launch to save."""
    return step


class CudaGraphs:
    """Records CUDA graphs that share one memory pool: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """``step`` runs once before it is recorded, so that nothing is loaded, allocated or tuned
        while recording. Other threads may use the device meanwhile.
        """
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            step()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = step()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def recorder_for(device: torch.device) -> Recorder:
    return CudaGraphs() if device.type == "cuda" else run_each_time
