"""The extension with its CUDA kernels, compiled by nvcc against whatever torch is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from hybrid_kernels._build import NO_NVCC, find_csrc, installed_nvcc

COUNT = """
import torch
from hybrid_kernels import _loader
_loader.native_module()
names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names()
         if name.startswith("hybrid_kernels::")}
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(*sorted(n for n in names if has(f"hybrid_kernels::{n}", "CUDA")))
"""


def _registered() -> set[str]:
    """Operators that a ``*_cuda_op.cpp`` registers."""
    written = set()
    for path in find_csrc().rglob("*_cuda_op.cpp"):
        written |= set(re.findall(r'm\.impl\("(\w+)"', path.read_text()))
    return written


def test_every_operator_has_a_cuda_implementation() -> None:
    declared = set(re.findall(r'"(\w+)\(', (find_csrc() / "schema.cpp").read_text()))
    assert declared
    assert declared == _registered()


@pytest.mark.slow
@pytest.mark.skipif(installed_nvcc() is None, reason=NO_NVCC)
def test_the_extension_compiles_links_and_registers_its_cuda_kernels() -> None:
    environment = {
        **os.environ,
        "HYBRID_KERNELS_BUILD": "cuda",
        "HYBRID_KERNELS_REQUIRE_NATIVE": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert set(run.stdout.split()) == _registered()
