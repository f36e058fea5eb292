"""Log-probability of a target and entropy, from hidden states and the head, without the logits.

A program multiplies 64 rows of hidden states with 4,096 rows of the head, 128 at a time (float32:
32 and 32), and keeps
of a row's logits four floats: their maximum m, the sums of exp(z - m) and of (z - m) exp(z - m),
and the target's, where z = logit / temperature. A second kernel merges a row's chunks of the
vocabulary in order, in double. Chunks lie at fixed places, so a row's result does not depend on the
rows beside it.

  bytes: (N h + V h) sizeof(T), the head again from L2 for every 64 rows; 16 N ceil(V / 4096) * 2 of
    partial results, 28 N of results and targets
  flops: 2 N V h and about 8 N V
  bound: tensor cores (N >= 64)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_kernels.triton_kernels.linear import tile_for

TILE = {"ROWS": 64, "COLS": 128, "STEP": 64}
CHUNK = 4096  # of the vocabulary
WARPS, STAGES = 8, 3
MERGE_ROWS = 128


@triton.jit
def head_chunk_kernel(
    hidden, weight, targets, partial, N, V, K, hidden_stride, weight_stride, inverse_temperature,
    CHAINS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(1)
    rows_in = rows < N
    target = tl.load(targets + rows, mask=rows_in, other=-1)
    hidden_rows = hidden + rows.to(tl.int64)[:, None] * hidden_stride
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    hit = tl.zeros((ROWS,), tl.float32)
    for first in range(chunk * CHUNK, min(V, (chunk + 1) * CHUNK), COLS):
        n = first + tl.arange(0, COLS)
        weight_rows = weight + n.to(tl.int64)[:, None] * weight_stride
        z = tl.zeros((ROWS, COLS), tl.float32)
        for k in range(0, K, STEP):
            ks = k + tl.arange(0, STEP)
            k_in = (ks < K)[None, :]
            a = tl.load(hidden_rows + ks[None, :], mask=rows_in[:, None] & k_in, other=0.0)
            b = tl.load(weight_rows + ks[None, :], mask=(n < V)[:, None] & k_in, other=0.0)
            if CHAINS:
                z += tl.dot(a, tl.trans(b), input_precision="ieee")
            else:
                z = tl.dot(a, tl.trans(b), z)
        z = tl.where((n < V)[None, :], z * inverse_temperature, float("-inf"))
        hit += tl.sum(tl.where(n[None, :] == target[:, None], z, 0.0), 1)
        now = tl.maximum(most, tl.max(z, 1))
        shift = tl.where(sums > 0, most - now, 0.0)
        scale = tl.exp(shift)
        e = tl.exp(z - now[:, None])
        weighted = (weighted + shift * sums) * scale
        weighted += tl.sum(tl.where(e > 0, (z - now[:, None]) * e, 0.0), 1)
        sums = sums * scale + tl.sum(e, 1)
        most = now
    at = partial + (chunk * N + rows).to(tl.int64) * 4
    tl.store(at, most, mask=rows_in)
    tl.store(at + 1, sums, mask=rows_in)
    tl.store(at + 2, weighted, mask=rows_in)
    tl.store(at + 3, hit, mask=rows_in)


@triton.jit
def head_merge_kernel(
    partial, targets, logprob, entropy, lse, N, V, chunks, ROWS: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows_in = rows < N
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    for chunk in range(0, chunks):
        at = partial + (chunk * N + rows).to(tl.int64) * 4
        most = tl.maximum(most, tl.load(at, mask=rows_in, other=float("-inf")))
    sums = tl.zeros((ROWS,), tl.float64)
    weighted = tl.zeros((ROWS,), tl.float64)
    hit = tl.zeros((ROWS,), tl.float64)
    for chunk in range(0, chunks):
        at = partial + (chunk * N + rows).to(tl.int64) * 4
        shift = (tl.load(at, mask=rows_in, other=0.0) - most).to(tl.float64)
        part = tl.load(at + 1, mask=rows_in, other=0.0).to(tl.float64)
        scale = tl.exp(shift)
        sums += part * scale
        weighted += (tl.load(at + 2, mask=rows_in, other=0.0).to(tl.float64) + shift * part) * scale
        hit += tl.load(at + 3, mask=rows_in, other=0.0).to(tl.float64)
    log_sum = tl.log(sums)
    total = most.to(tl.float64) + log_sum
    target = tl.load(targets + rows, mask=rows_in, other=0)
    bad = (target < 0) | (target >= V)
    tl.store(lse + rows, total, mask=rows_in)
    tl.store(entropy + rows, (log_sum - weighted / sums).to(tl.float32), mask=rows_in)
    score = tl.where(bad, float("nan"), (hit - total).to(tl.float32))
    tl.store(logprob + rows, score, mask=rows_in)


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, entropy) float32 and the log-sum-exp, float64, each ``[N]``.

    Args:
        hidden: ``[N, h]``.
        weight: ``[V, h]`` of the same dtype.
        targets: ``[N]`` int64; one outside the vocabulary gives NaN.
        temperature: divides the logits.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    rows, vocab = len(hidden), len(weight)
    if hidden.shape[1:] != weight.shape[1:] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"linear_token_logprobs: hidden is {list(hidden.shape)} of {hidden.dtype} and weight "
            f"{list(weight.shape)} of {weight.dtype}; expected one width and dtype"
        )
    if targets.shape != (rows,) or targets.dtype != torch.int64:
        raise ValueError(
            f"linear_token_logprobs: targets is {list(targets.shape)} of {targets.dtype}; expected "
            f"{[rows]} of torch.int64"
        )
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    chunks = triton.cdiv(vocab, CHUNK)
    partial = torch.empty(chunks, rows, 4, dtype=torch.float32, device=hidden.device)
    logprob, entropy = partial.new_empty(2, rows)
    lse = partial.new_empty(rows, dtype=torch.float64)
    if rows:
        tile = tile_for(hidden.dtype)
        head_chunk_kernel[(triton.cdiv(rows, tile["ROWS"]), chunks)](
            hidden, weight, targets.contiguous(), partial, rows, vocab, hidden.shape[1],
            hidden.stride(0), weight.stride(0), 1.0 / temperature,
            CHAINS=hidden.dtype is torch.float32, CHUNK=CHUNK, **tile,
            num_warps=WARPS, num_stages=STAGES, enable_fp_fusion=True,
        )  # fmt: skip
        head_merge_kernel[(triton.cdiv(rows, MERGE_ROWS),)](
            partial, targets, logprob, entropy, lse, rows, vocab, chunks, ROWS=MERGE_ROWS,
            enable_fp_fusion=True,
        )  # fmt: skip
    return logprob, entropy, lse
