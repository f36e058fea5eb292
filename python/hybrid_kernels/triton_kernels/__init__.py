"""The kernels that are written in Triton: large matrix products with one order of sums.

A file holds a kernel, opened by its mapping, bytes, flops and bound, and a launcher that takes
tensors. `ops` decides who calls it; `gate` compiles it for every GPU without one.

Triton is an extra (``pip install hybrid-engine[triton]``, MIT licence); it comes with CUDA builds
of torch.
"""

from __future__ import annotations

import functools
import importlib.util


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None
