"""Products on a GPU: which of them Triton computes, and what torch must know of its kernels.

With ``HYBRID_KERNELS_EXACT=1`` every forward product of `linear` is one Triton kernel with one
order of sums, whatever the number of rows: a decoded row and the same row in training have the same
bits. Logits are products like any other, then, unrounded, and sampled and scored by the kernels
that take logits. Without it cuBLAS computes products of more than 16 rows, which is faster and
gives a row other bits in another batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybrid_kernels import triton_kernels

LIBRARY = torch.library.Library("hybrid_kernels_triton", "DEF")
LIBRARY.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b,"
    " float lora_scale, int[] lora_splits, bool float_output) -> Tensor"
)


def exact(tensor: Tensor) -> bool:
    """Whether products with this tensor keep one order of sums by way of Triton. On the CPU they
    always do, without it.

    Raises:
        RuntimeError: it is asked for and Triton is missing.
    """
    if not tensor.is_cuda or os.environ.get("HYBRID_KERNELS_EXACT", "0") in ("", "0"):
        return False
    if not triton_kernels.installed():
        raise RuntimeError(
            "HYBRID_KERNELS_EXACT=1 needs Triton on a GPU: pip install 'hybrid-engine[triton]'"
        )
    return True


def linear_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    lora_splits: Sequence[int],
    float_output: bool,
) -> Tensor:
    from hybrid_kernels.triton_kernels.linear import linear

    return linear(x, weight, bias, lora_a, lora_b, lora_scale, lora_splits, float_output)


LIBRARY.impl("linear", linear_kernel, "CUDA")


def _fake_linear(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    dtype = torch.float32 if rest[-1] else x.dtype
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


torch.library.register_fake("hybrid_kernels_triton::linear", _fake_linear)
