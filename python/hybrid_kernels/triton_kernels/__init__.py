"""The kernels that are written in Triton: large matrix products, alone and under a reduction.

Each file holds a kernel, opened by its mapping, bytes, flops and bound, and a launcher that takes
tensors. `ops` decides who calls them; `gate` compiles them for every GPU without one.

Triton is an extra (``pip install hybrid-engine[triton]``, MIT licence); it comes with CUDA builds
of torch.
"""

from __future__ import annotations

import functools
import importlib.util


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None
