"""The ``bench`` fixture, and what the numbers were measured on."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hybrid_kernels
from hybrid_kernels.bench import bench as run_bench
from hybrid_kernels.bench import machine_limits


@pytest.fixture
def bench(benchmark: Any) -> Callable[..., None]:
    """``hybrid_kernels.bench.bench`` on this test's benchmark fixture."""
    return functools.partial(run_bench, benchmark)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    limits = machine_limits()
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["platform"] = platform.platform()
    machine_info["isa"] = hybrid_kernels.native_module().isa()
    machine_info["read_gb_per_s"] = round(limits.read_gb_per_s, 1)
    machine_info["sgemm_gflop_per_s"] = round(limits.gflop_per_s, 1)
