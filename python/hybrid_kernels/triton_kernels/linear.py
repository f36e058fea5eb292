"""``y = x W^T + b`` (and a low-rank term) with one order of sums, for any number of rows.

A program takes tile after tile of the output, 64 rows by 128 columns (float32: 32 by 32), the tiles
of a column of W one after the other, so that W is read from memory once while its rows are in L2. K
runs in steps of 64 (16), always from 0 to K, and no two programs share a sum: an element of y
depends on its row of x and its row of W alone, whatever M, its place in the tile or the number of
programs. cuBLAS, which chooses another kernel for another M, does not give that. In 16-bit types an
element is one chain of tensor-core products with float32 sums; in float32 each step is a chain of
multiply-adds of its own, added to the total.

  bytes: (M K + N K + M N) sizeof(T), and x again from L2 for every 128 columns
  flops: 2 M N K, on whole tiles: up to 64 rows cost what 64 cost
  bound: memory to about 64 rows (W), then tensor cores; float32: multiply-adds
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = {"ROWS": 64, "COLS": 128, "STEP": 64}
FLOAT_TILE = {"ROWS": 32, "COLS": 32, "STEP": 16}  # multiply-adds: both operands in registers
RANKS = 16  # of the low-rank term, a step
WARPS, STAGES = 8, 3


@triton.jit
def linear_kernel(
    x, weight, bias, inner, lora_b, y, M, N, K, x_stride, weight_stride, inner_stride, y_stride,
    rank, scale,
    HAS_BIAS: tl.constexpr, HAS_LORA: tl.constexpr, CHAINS: tl.constexpr, PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, ROWS)
    for tile in range(tl.program_id(0), tiles_m * tl.cdiv(N, COLS), PROGRAMS):
        m = (tile % tiles_m) * ROWS + tl.arange(0, ROWS)
        n = (tile // tiles_m) * COLS + tl.arange(0, COLS)
        m_in, n_in = (m < M)[:, None], (n < N)[:, None]
        x_rows = x + m.to(tl.int64)[:, None] * x_stride
        weight_rows = weight + n.to(tl.int64)[:, None] * weight_stride
        total = tl.zeros((ROWS, COLS), tl.float32)
        for k in range(0, K, STEP):
            ks = k + tl.arange(0, STEP)
            k_in = (ks < K)[None, :]
            a = tl.load(x_rows + ks[None, :], mask=m_in & k_in, other=0.0)
            b = tl.load(weight_rows + ks[None, :], mask=n_in & k_in, other=0.0)
            if CHAINS:
                total += tl.dot(a, tl.trans(b), input_precision="ieee")
            else:
                total = tl.dot(a, tl.trans(b), total)
        if HAS_LORA:
            inner_rows = inner + m.to(tl.int64)[:, None] * inner_stride
            lora_rows = lora_b + n.to(tl.int64)[:, None] * rank
            for first in range(0, rank, RANKS):
                r = first + tl.arange(0, RANKS)
                r_in = (r < rank)[None, :]
                a = tl.load(inner_rows + r[None, :], mask=m_in & r_in, other=0.0)
                b = tl.load(lora_rows + r[None, :], mask=n_in & r_in, other=0.0)
                total += scale * tl.dot(a, tl.trans(b), input_precision="ieee")
        if HAS_BIAS:
            total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        y_at = y + m.to(tl.int64)[:, None] * y_stride + n[None, :]
        tl.store(y_at, total.to(y.dtype.element_ty), mask=m_in & (n < N)[None, :])


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    lora_splits: Sequence[int],
    float_output: bool = False,
) -> Tensor:
    """See `hybrid_kernels.ops.linear`; ``float_output`` leaves the sums unrounded.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(x, weight, bias, lora_a, lora_b, lora_splits)
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    outputs = weight.shape[0]
    dtype = torch.float32 if float_output else x.dtype
    y = torch.empty(len(rows), outputs, dtype=dtype, device=x.device)
    if lora_a is None or lora_b is None:
        _launch(rows, weight, bias, None, None, 1.0, y)
        return y.view(*x.shape[:-1], outputs)
    rank, begin = lora_b.shape[1], 0
    inner = rows.new_empty(len(rows), lora_a.shape[0])
    _launch(rows, lora_a.contiguous(), None, None, None, 1.0, inner)
    for split, size in enumerate(lora_splits):
        end = begin + size
        _launch(
            rows,
            weight[begin:end],
            None if bias is None else bias[begin:end],
            inner[:, split * rank : (split + 1) * rank],
            lora_b[begin:end].contiguous(),
            lora_scale,
            y[:, begin:end],
        )
        begin = end
    return y.view(*x.shape[:-1], outputs)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inner: Tensor | None,
    lora_b: Tensor | None,
    scale: float,
    y: Tensor,
) -> None:
    rows, outputs, has_lora = len(x), len(weight), inner is not None
    if not rows or not outputs:
        return
    tile = tile_for(x.dtype)
    tiles = triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(outputs, tile["COLS"])
    programs = min(tiles, multiprocessors(x.device))
    rank = 0 if lora_b is None else lora_b.shape[1]
    linear_kernel[(programs,)](
        x, weight, x if bias is None else bias, x if inner is None else inner,
        x if lora_b is None else lora_b, y, rows, outputs, x.shape[1],
        x.stride(0), weight.stride(0), inner.stride(0) if inner is not None else 0, y.stride(0),
        rank, scale,
        HAS_BIAS=bias is not None, HAS_LORA=has_lora, CHAINS=x.dtype is torch.float32,
        PROGRAMS=programs, RANKS=RANKS, **tile,
        num_warps=WARPS, num_stages=STAGES, enable_fp_fusion=True,
    )  # fmt: skip


def tile_for(dtype: torch.dtype) -> dict[str, int]:
    """One tile for a type, for any M: another would be another order of sums."""
    return FLOAT_TILE if dtype is torch.float32 else TILE


def multiprocessors(device: torch.device) -> int:
    """Programs that run at once; in the interpreter a few, so that each has several tiles."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    splits: Sequence[int],
) -> None:
    def expect(name: str, tensor: Tensor | None, *shape: int) -> None:
        if tensor is None:
            return
        if tuple(tensor.shape) != shape or tensor.dtype != x.dtype:
            raise ValueError(
                f"linear: {name} is {list(tensor.shape)} of {tensor.dtype}; "
                f"expected {list(shape)} of {x.dtype}"
            )

    outputs, rank = weight.shape[0], 0 if lora_b is None else lora_b.shape[-1]
    expect("weight", weight, outputs, x.shape[-1])
    expect("bias", bias, outputs)
    expect("lora_a", lora_a, len(splits) * rank, x.shape[-1])
    expect("lora_b", lora_b, outputs, rank)
    if lora_b is not None and sum(splits) != outputs:
        raise ValueError(f"linear: lora_splits {list(splits)} do not sum to {outputs}")
