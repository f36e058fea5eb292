"""The ``bench`` fixture, and what the numbers were measured on."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hybrid_kernels
from hybrid_kernels.bench import bench as run_bench
from hybrid_kernels.bench import machine_limits

PACKAGES = ("torch", "transformers", "numpy", "llama-cpp-python", "trl", "deepspeed")


@pytest.fixture
def bench(benchmark: Any) -> Callable[..., None]:
    """``hybrid_kernels.bench.bench`` on this test's benchmark fixture."""
    return functools.partial(run_bench, benchmark)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    limits = machine_limits()
    machine_info["versions"] = installed_versions()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["platform"] = platform.platform()
    machine_info["isa"] = hybrid_kernels.native_module().isa()
    machine_info["read_gb_per_s"] = round(limits.read_gb_per_s, 1)
    machine_info["sgemm_gflop_per_s"] = round(limits.gflop_per_s, 1)
    machine_info["command"] = command(config)


def installed_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def command(config: pytest.Config) -> str:
    """How pytest was called, with the variables that choose kernels, threads, memory and rounds."""
    variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if chosen(name)]
    return shlex.join(
        [*variables, "pytest", *map(relative, map(str, config.invocation_params.args))]
    )


def chosen(variable: str) -> bool:
    names = ("HYBRID_KERNELS_ISA", "HYBRID_BENCH_ROUNDS", "OMP_NUM_THREADS", "ATEN_CPU_CAPABILITY")
    return variable in names or variable.startswith(("ONEDNN_MAX", "MKL_ENABLE", "MALLOC_"))


def relative(argument: str) -> str:
    """Without the directories that only this machine has."""
    name, equals, value = argument.rpartition("=")
    return name + equals + (Path(value).name if value.startswith("/") else value)
