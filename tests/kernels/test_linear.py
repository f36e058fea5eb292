"""One order of sums for every batch: the bits of a row of linear, its backward, and the module."""

from __future__ import annotations

import math

import pytest
import torch

from hybrid_kernels import native_module, ops, reference
from hybrid_kernels.nn import Linear
from hybrid_kernels.testing import assert_as_accurate, assert_same_bits

ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 100, 257]
# (N, K): below, at and above vectors, panels and packed K-blocks, and a real layer
SIZES = [
    (1, 1),
    (5, 3),
    (15, 17),
    (16, 16),
    (33, 129),
    (48, 128),
    (100, 257),
    (65, 600),
    (576, 576),
]


def _operands(n: int, k: int, rows: int = 257, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    shapes = ((rows, k), (n, k), (n,))
    return [torch.randn(shape, generator=rng) for shape in shapes]


@pytest.mark.parametrize("n, k", SIZES)
def test_row_has_the_same_bits_in_every_batch(n: int, k: int, threads) -> None:
    x, weight, bias = _operands(n, k)
    threads(1)
    whole = ops.linear(x, weight, bias)
    for count in (1, 2):
        threads(count)
        for rows in ROWS:
            start = (257 - rows) // 2  # another place in the batch as well
            part = x[start : start + rows].clone()
            assert_same_bits(ops.linear(part, weight, bias), whole[start : start + rows])


@pytest.mark.parametrize("n, k", SIZES)
def test_bfloat16_weight_gives_the_bits_of_its_floats(n: int, k: int) -> None:
    x, weight, bias = _operands(n, k)
    halves = weight.bfloat16()
    for rows in ROWS:
        expected = ops.linear(x[:rows], halves.float(), bias)
        assert_same_bits(ops.linear(x[:rows], halves, bias), expected)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_every_bfloat16_is_widened_exactly(rows: int) -> None:
    """All finite bit patterns as the weights of one-hot rows, zeros and subnormals included, which
    a matrix unit takes for zero.
    """
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    patterns = patterns[patterns.isfinite()]
    y = ops.linear(torch.ones(rows, 1), patterns[:, None])
    expected = patterns.float()
    if native_module().isa() == "amx":
        expected[expected.abs() < torch.finfo(torch.float32).tiny] = 0
    assert torch.equal(y, expected.expand(rows, -1))


def test_bfloat16_weight_in_training() -> None:
    """The gradient of x is that of the widened weight; a parameter's is rounded to its own type."""
    x, weight, bias = _operands(48, 128, 33)
    grads = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [x.clone(), weight.bfloat16().to(dtype), bias.bfloat16().to(dtype)]
        y = ops.linear(*(leaf.requires_grad_() for leaf in leaves))
        grads.append(torch.autograd.grad(y.square().sum(), leaves))
    for ours, exact in zip(*grads, strict=True):
        assert_same_bits(ours, exact.to(ours.dtype))


def test_low_rank_row_has_the_same_bits_in_every_batch(threads) -> None:
    x, weight, bias = _operands(96, 130)
    rng = torch.Generator().manual_seed(1)
    lora_a, lora_b = torch.randn(3 * 8, 130, generator=rng), torch.randn(96, 8, generator=rng)
    low_rank = (lora_a, lora_b, 2.0, [48, 16, 32])
    whole = ops.linear(x, weight, bias, *low_rank)
    for count in (1, 2):
        threads(count)
        for rows in ROWS:
            assert_same_bits(ops.linear(x[:rows], weight, bias, *low_rank), whole[:rows])


def test_sum_runs_over_k_in_order() -> None:
    """2^24 + 1 is no float: in order, only the last 1 of each pair below survives, or none."""
    big = float(2**24)
    x = torch.tensor([[big, 1.0, -big, 1.0], [1.0, 1.0, big, -big]])
    ones = torch.ones(1, 4)
    assert ops.linear(x, ones).flatten().tolist() == [1.0, 2.0]
    many = x.repeat(100, 1)
    assert ops.linear(many, ones).flatten().tolist() == [1.0, 2.0] * 100


@pytest.mark.parametrize("rows, n, k", [(0, 5, 3), (4, 0, 3), (4, 5, 0), (40, 5, 0), (0, 0, 0)])
def test_empty_sizes(rows: int, n: int, k: int) -> None:
    x, weight, bias = _operands(n, k, rows)
    assert_same_bits(
        ops.linear(x, weight, bias), bias.expand(rows, n) if k == 0 else torch.empty(rows, n)
    )


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_reads_and_writes_nothing_outside(rows: int) -> None:
    """Neighbours of a slice of a larger tensor are NaN: one read past an edge would show."""
    n, k = 19, 21
    x, weight, bias = _operands(n, k, rows)
    room = torch.full((4 * (rows + n) * k,), math.nan)
    room[3 : 3 + rows * k] = x.flatten()
    room[-7 - n * k : -7] = weight.flatten()
    y = ops.linear(room[3 : 3 + rows * k].view(rows, k), room[-7 - n * k : -7].view(n, k), bias)
    assert_same_bits(y, ops.linear(x, weight, bias))
    assert y.isfinite().all()


def test_leading_dimensions_and_strides() -> None:
    x, weight, bias = _operands(7, 12, 24)
    expected = ops.linear(x, weight, bias)
    assert_same_bits(ops.linear(x.view(2, 3, 4, 12), weight, bias), expected.view(2, 3, 4, 7))
    assert_same_bits(ops.linear(x.T.contiguous().T, weight.T.contiguous().T, bias), expected)


NAMES = ("x", "weight", "bias", "lora_a", "lora_b")


@pytest.mark.parametrize(
    "wanted", [("x",), ("weight",), ("bias",), ("lora_a",), ("lora_b",), NAMES[3:], NAMES]
)
def test_computes_the_wanted_gradients_only(wanted: tuple[str, ...]) -> None:
    x, weight, bias = _operands(30, 20, 9)
    rng = torch.Generator().manual_seed(1)
    lora = torch.randn(2 * 4, 20, generator=rng), torch.randn(30, 4, generator=rng)
    leaves = [
        t.requires_grad_(name in wanted)
        for name, t in zip(NAMES, (x, weight, bias, *lora), strict=True)
    ]
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ops.linear(*leaves, 0.5, [10, 20])
    if wanted == ("x",):
        assert not any(t.data_ptr() == x.data_ptr() for t in kept)
    if "x" not in wanted:
        assert not any(t.data_ptr() == weight.data_ptr() for t in kept)
    y.backward(torch.ones_like(y))
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    exact = reference.linear(*doubles, 0.5, [10, 20])
    exact.backward(torch.ones_like(exact))
    for got, want in zip(leaves, doubles, strict=True):
        assert (got.grad is None) == (want.grad is None)
        if want.grad is not None:
            torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-5, atol=1e-5)


def test_module_starts_as_its_base_and_learns_like_separate_layers() -> None:
    torch.manual_seed(0)
    layer = Linear(24, 40, splits=(24, 8, 8), lora_rank=4, lora_alpha=8)
    x = torch.randn(5, 24)
    assert_same_bits(layer(x), ops.linear(x, layer.weight, layer.bias))
    assert layer.lora_scale == 2.0
    assert layer.lora_a.abs().max() <= 1 / math.sqrt(24)  # kaiming uniform with a = sqrt 5
    torch.nn.init.normal_(layer.lora_b)
    parts = zip(
        layer.weight.split(layer.splits),
        layer.bias.split(layer.splits),
        layer.lora_a.chunk(3),
        layer.lora_b.split(layer.splits),
        strict=True,
    )
    separate = [ops.linear(x, w, bias, a, b, layer.lora_scale) for w, bias, a, b in parts]
    assert_same_bits(layer(x), torch.cat(separate, dim=1))


def test_module_refuses_splits_that_do_not_sum() -> None:
    with pytest.raises(ValueError, match=r"splits \(3, 4\) sum to 7; expected 8"):
        Linear(2, 8, splits=(3, 4))


def test_half_precision_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYBRID_KERNELS_REQUIRE_NATIVE")
    x, weight, bias = (t.bfloat16() for t in _operands(6, 8, 4))
    with pytest.warns(RuntimeWarning, match="linear: no native kernel for torch.bfloat16 on cpu"):
        y = ops.linear(x, weight, bias)
    assert_as_accurate(y, reference.linear(x.double(), weight.double(), bias.double()), y)


@pytest.mark.parametrize("of_input", [False, True], ids=["", "input-gradient"])
@pytest.mark.parametrize("splits", [None, (7, 1, 12)], ids=["plain", "adapted"])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_a_computed_weight_is_asked_for_again(rows: int, splits, of_input: bool) -> None:
    """The bits of `linear`, gradients included, without the weight among what is saved."""
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 9, generator=rng), torch.randn(20, 9, generator=rng)
    bias = torch.randn(20, generator=rng)
    factors = [] if splits is None else [torch.randn(6, 9, generator=rng), torch.randn(20, 2)]
    wanted = [*([x] if of_input else []), *factors]
    for tensor in wanted:
        tensor.requires_grad_()
    scale = [] if splits is None else [0.5, splits]
    asked, saved = [], []

    def weight_of() -> torch.Tensor:
        asked.append(weight.clone())
        return asked[-1]

    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        ours = ops.linear_recomputed(weight_of, x, bias, *factors, *scale)
    theirs = ops.linear(x, weight, bias, *factors, *scale)
    assert_same_bits(ours, theirs)
    assert weight.shape not in saved
    if wanted:
        upstream = torch.randn(rows, 20, generator=rng)
        pairs = (torch.autograd.grad(y, wanted, upstream) for y in (ours, theirs))
        for mine, other in zip(*pairs, strict=True):
            assert_same_bits(mine, other)
    assert len(asked) == 1 + of_input
