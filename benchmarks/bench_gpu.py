"""Kernels on a GPU against torch, FlashInfer and flash-attn, in bfloat16:
``pytest benchmarks/bench_gpu.py -m gpu --benchmark-only``.

The GPU's events tell the time, on a cold L2 cache. `extra_info` has the rates and, labelled so, the
bound by datasheet (`hybrid_kernels.cost`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.gpu_cases import CASES, PEERS, Scale
from hybrid_kernels.cost import COSTS, GPUS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.mark.parametrize("name, peer", [(name, peer) for name in CASES for peer in PEERS[name]])
def bench_against(bench: Callable[..., None], benchmark: Any, name: str, peer: str) -> None:
    case = CASES[name](Scale(), "cuda", torch.bfloat16)
    if peer not in case.peers:
        pytest.skip(f"{peer} is not installed")
    bench(case.ours, bytes=case.bytes, flops=case.flops, device="cuda", baseline=case.peers[peer])
    for gpu in GPUS:
        bound = gpu.bound(COSTS[case.cost], case.sizes)
        benchmark.extra_info[f"bound_seconds_{gpu.name}_datasheet"] = bound
