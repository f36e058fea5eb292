"""Merging LoRA: the split layout, and an in-place pair that restores every byte of the base."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybrid_kernels.ops.lora import lora_merge, lora_merge_, lora_unmerge_

DTYPES = [torch.float32, torch.bfloat16]
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype is torch.float32 else torch.int16)


def _from_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return bits.to(torch.int32 if dtype is torch.float32 else torch.int16).view(dtype)


def _weights_of_every_exponent(dtype: torch.dtype) -> Tensor:
    """[256, 256], a row an exponent, both signs; for bf16 that is every bit pattern."""
    exponent = torch.arange(256).unsqueeze(1)
    if dtype is torch.bfloat16:
        low = torch.arange(256).unsqueeze(0)
        return _from_bits(((low & 0x80) << 8 | exponent << 7 | low & 0x7F), dtype)
    mantissa = torch.randint(2**23, (256, 128), generator=torch.Generator().manual_seed(3))
    mantissa[:, :4] = torch.tensor([0, 1, 2**23 - 1, 2**22])
    positive = exponent << 23 | mantissa
    return _from_bits(torch.cat([positive, positive | 1 << 31], dim=1), dtype)


def _ordinary(dtype: torch.dtype, delta: float) -> tuple[Tensor, Tensor, Tensor, float, list[int]]:
    """A layer as trained: weights of 0.02, a delta that is a fraction of them, two splits."""
    rng = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(96, 200, generator=rng)
    a, b = torch.randn(16, 200, generator=rng), torch.randn(96, 8, generator=rng)
    return weight.to(dtype), a, b, 0.02 * delta / 8**0.5, [64, 32]


@both_dtypes
def test_each_split_has_its_own_pair(dtype: torch.dtype) -> None:
    weight, a, b, scale, splits = _ordinary(dtype, 0.1)
    merged = lora_merge(weight, a, b, scale, splits)
    for rows, pair in [(slice(0, 64), slice(0, 8)), (slice(64, 96), slice(8, 16))]:
        exact = weight[rows].double() + scale * (b[rows].double() @ a[pair].double())
        rounding = exact.abs() * torch.finfo(dtype).eps / 2
        products = scale * (
            b[rows].double().abs() @ a[pair].double().abs()
        )  # at most ten roundings of partial sums
        assert ((merged[rows].double() - exact).abs() <= rounding + 10 * 2**-24 * products).all()
    assert merged.data_ptr() != weight.data_ptr()


@both_dtypes
@pytest.mark.parametrize("delta", [1e-4, 0.03, 10.0])
def test_hundred_cycles_leave_the_base_alone(dtype: torch.dtype, delta: float) -> None:
    weight, a, b, scale, splits = _ordinary(dtype, delta)
    before, address = weight.clone(), weight.data_ptr()
    for cycle in range(100):
        factors = (a * (1 + 0.05 * cycle), b, scale, splits)
        merged = lora_merge(weight, *factors)
        record = lora_merge_(weight, *factors)
        assert torch.equal(weight, merged)
        lora_unmerge_(weight, *factors, record)
    assert torch.equal(_bits(weight), _bits(before))
    assert weight.data_ptr() == address


def test_ordinary_weights_cost_one_byte() -> None:
    """A weight escapes below about 1/128 of its delta: one in thousands for a delta of 1 %."""
    for dtype in DTYPES:
        weight, *factors = _ordinary(dtype, 0.01)
        record = lora_merge_(weight, *factors)
        assert record.residual.dtype is torch.int8
        assert record.residual.shape == weight.shape
        assert len(record.escape_index) <= weight.numel() / 2000


@both_dtypes
@pytest.mark.parametrize(
    "exponent", [-149, -140, -126, -100, -60, -24, -10, -1, 0, 1, 7, 24, 60, 100, 127]
)
def test_every_exponent_is_restored(dtype: torch.dtype, exponent: int) -> None:
    """Deltas of one exponent onto weights of all: overflow, underflow, absorption, cancellation."""
    weight = _weights_of_every_exponent(dtype)
    before = _bits(weight).clone()
    a = torch.full((1, 256), 2.0**exponent) * torch.linspace(1, 1.99, 256).mul(
        1 - 2 * (torch.arange(256) % 2)
    )
    b = torch.ones(256, 1)
    factors = (a, b, 1.0, [256])
    record = lora_merge_(weight, *factors)
    lora_unmerge_(weight, *factors, record)
    assert torch.equal(_bits(weight), before)


@both_dtypes
@pytest.mark.parametrize("value", [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3e38])
def test_special_deltas_are_undone(dtype: torch.dtype, value: float) -> None:
    weight = _weights_of_every_exponent(dtype)
    before = _bits(weight).clone()
    factors = (torch.full((1, 256), value), torch.ones(256, 1), 1.0, [256])
    lora_unmerge_(weight, *factors, lora_merge_(weight, *factors))
    assert torch.equal(_bits(weight), before)


@both_dtypes
def test_exact_cancellation_is_undone(dtype: torch.dtype) -> None:
    """delta = -weight, or one unit beside it: the merged weight is 0 or nearly so."""
    row = torch.linspace(-3, 3, 257).to(dtype)
    weight = row.repeat(3, 1)
    before = _bits(weight).clone()
    b = torch.tensor([[-1.0], [-1.0 - 2**-23], [-1.0 + 2**-8]])
    factors = (row.float().unsqueeze(0), b, 1.0, [3])
    record = lora_merge_(weight, *factors)
    assert weight[0].eq(0).all()
    lora_unmerge_(weight, *factors, record)
    assert torch.equal(_bits(weight), before)


@both_dtypes
def test_factors_in_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    weight, a, b, scale, splits = _ordinary(dtype, 0.1)
    factors = (a.to(dtype), b.to(dtype), scale, splits)
    merged = lora_merge(weight, *factors)
    assert torch.equal(
        merged, lora_merge(weight, a.to(dtype).float(), b.to(dtype).float(), scale, splits)
    )
    before = weight.clone()
    lora_unmerge_(weight, *factors, lora_merge_(weight, *factors))
    assert torch.equal(weight, before)


def test_parameters_merge_in_place() -> None:
    weight, a, b, scale, splits = _ordinary(torch.float32, 0.1)
    parameter = torch.nn.Parameter(weight.clone())
    record = lora_merge_(parameter, torch.nn.Parameter(a), b, scale, splits)
    assert not torch.equal(parameter, weight)
    assert not record.residual.requires_grad
    assert parameter._version > 0  # autograd sees the change


@pytest.mark.parametrize("position, name", [(0, "weight"), (1, "lora_a"), (2, "lora_b")])
def test_a_changed_operand_is_refused(position: int, name: str) -> None:
    operands = list(_ordinary(torch.float32, 0.1))
    record = lora_merge_(*operands)
    operands[position].mul_(2)
    with pytest.raises(
        ValueError, match=f"^lora_unmerge_: {name} was changed in place after lora_merge_"
    ):
        lora_unmerge_(*operands, record)


def test_only_contiguous_weights_merge_in_place() -> None:
    weight, *factors = _ordinary(torch.float32, 0.1)
    wide = torch.zeros(96, 400)
    with pytest.raises(
        ValueError, match=r"^lora_merge_: weight has strides \[400, 2\]; expected contig"
    ):
        lora_merge_(wide[:, ::2], *factors)


def test_double_weights_have_no_kernel() -> None:
    weight, *factors = _ordinary(torch.float32, 0.1)
    with pytest.raises(RuntimeError, match=r"lora_merge: no native kernel for torch.float64"):
        lora_merge(weight.double(), *factors)
