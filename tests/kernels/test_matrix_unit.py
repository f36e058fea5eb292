"""linear on a matrix unit is the sum that csrc/linear/matrix_unit.h describes, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hybrid_kernels import native_module, ops
from hybrid_kernels.testing import assert_same_bits

pytestmark = pytest.mark.skipif(
    native_module().isa() != "amx", reason="the processor, or HYBRID_KERNELS_ISA, has no AMX"
)

STEP, CHAIN_STEPS = 32, 18
# (part of the weight, part of x), the leading one 0
PRODUCTS = [(2, 0), (1, 0), (1, 1), (0, 1), (0, 2), (0, 0)]


def _cut_off(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    """To the nearest bfloat16, ties away from zero."""
    return _cut_off((values.view(np.uint32) + np.uint32(0x8000)).view(np.float32))


def _parts(values: np.ndarray, leading) -> list[np.ndarray]:
    parts = []
    for _ in range(3):
        parts.append(leading(values))
        values = values - parts[-1]
    assert not values.any()  # the three are the float
    return parts


def _chain(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A product and a sum of such floats fit a double: only the sum's end is rounded."""
    total = np.zeros(len(weight), np.float32)
    for column, factor in zip(weight.T.astype(np.float64), x.astype(np.float64), strict=True):
        total = (total + column * factor).astype(np.float32)
    return total


def _row(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """One row of ``x W^T``."""
    depth = -(-len(x) // STEP) * STEP
    weight = np.pad(weight, ((0, 0), (0, depth - weight.shape[1])))
    x = np.pad(x, (0, depth - len(x)))
    weights, xs = _parts(weight, _cut_off), _parts(x, _rounded)
    chains = []
    for start in range(0, depth, STEP * CHAIN_STEPS):
        total = np.zeros(len(weight), np.float32)
        for k in range(start, min(depth, start + STEP * CHAIN_STEPS), STEP):
            first, second = slice(k, k + 16), slice(k + 16, k + 32)
            for i, j in PRODUCTS:
                sums = [_chain(weights[i][:, half], xs[j][half]) for half in (first, second)]
                total = total + (sums[0] + sums[1])
        chains.append(total)
    return np.add.accumulate(chains)[-1]


@pytest.mark.parametrize("depth", [1, 32, 70, 576, 577, 1300])
def test_a_row_is_the_sum_described(depth: int) -> None:
    rng = torch.Generator().manual_seed(depth)
    weight = torch.rand(5, depth, generator=rng) + 0.5
    x = (torch.rand(3, depth, generator=rng) + 0.5) * torch.randn(3, depth, generator=rng).sign()
    expected = [_row(weight.numpy(), row) for row in x.numpy()]
    assert_same_bits(ops.linear(x, weight), torch.from_numpy(np.stack(expected)))


@pytest.mark.parametrize("rows", [1, 20, 70])
def test_a_gradient_product_is_the_same_sum(rows: int) -> None:
    """matmul of row-major and of transposed factors, against linear."""
    rng = torch.Generator().manual_seed(rows)
    a, b = torch.randn(rows, 700, generator=rng), torch.randn(700, 90, generator=rng)
    # Its left factor is cut off and its right one rounded: linear's weight and x.
    expected = ops.linear(b.T.contiguous(), a).T
    assert_same_bits(ops.matmul(a, b), expected.contiguous())
    assert_same_bits(ops.matmul(a.T.contiguous().T, b), expected.contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-60, -66, -72, -118])
def test_a_lone_row_has_the_same_bits_near_and_below_the_smallest_numbers(dtype, exponent) -> None:
    """It is summed by the vector units, which know subnormal numbers: parts, products, sums."""
    rng = torch.Generator().manual_seed(-exponent)
    x = torch.randn(20, 1200, generator=rng) * 2.0**exponent
    weight = (torch.randn(40, 1200, generator=rng) * 2.0**exponent).to(dtype)
    bias = torch.randn(40, generator=rng) * 2.0**-127
    whole = ops.linear(x, weight, bias)
    for row in (0, 19):
        assert_same_bits(ops.linear(x[row : row + 1], weight, bias), whole[row : row + 1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    """And stays in its row: an infinite factor gives NaN here."""
    x, weight = torch.ones(40, 50), torch.ones(70, 50)
    x[7, 3] = bad
    y = ops.linear(x, weight)
    assert not y[7].isfinite().any()
    assert (y[[i for i in range(40) if i != 7]] == 50).all()
    weight[65, 49] = bad
    assert not ops.linear(x, weight)[:, 65].isfinite().any()


def test_every_nan_is_kept() -> None:
    """Whichever bits of its significand are set: the parts lie in different ones."""
    patterns = [0x7F800001, 0x7F800100, 0x7F810000, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF]
    nans = torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)
    assert nans.isnan().all()
    assert ops.linear(nans[:, None], torch.ones(3, 1)).isnan().all()
    assert ops.linear(torch.ones(3, 1), nans[:, None]).isnan().all()
