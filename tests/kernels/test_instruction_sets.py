"""The bitwise promises of linear and attention hold on the lesser instruction sets, too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_kernels import native_module

HERE = Path(__file__).parent
LEVELS = ["generic", "avx2", "avx512", "amx"]


@pytest.mark.parametrize("isa", LEVELS)
def test_bits_on_instruction_set(isa: str) -> None:
    here = native_module().isa()
    if LEVELS.index(isa) > LEVELS.index(here):
        pytest.skip(f"the processor, or HYBRID_KERNELS_ISA, has {here} at most")
    if isa == here:
        pytest.skip("this run tests it already")
    # A passive wait: two runs that spin at each other's barriers on few cores would take minutes.
    env = os.environ | {"HYBRID_KERNELS_ISA": isa, "OMP_WAIT_POLICY": "passive"}
    files = [str(HERE / "test_linear.py"), str(HERE / "test_attention.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "bits"]
    result = subprocess.run([*command, *files], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
