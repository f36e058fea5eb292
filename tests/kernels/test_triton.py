"""The Triton kernels in Triton's interpreter, and who calls them.

The interpreter is chosen where a kernel is defined, so what runs in it does so in a process of its
own, one for the file.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrid_kernels import ops
from hybrid_kernels.ops import _exact
from hybrid_kernels.reference.sampling import token_logprobs as reference_scores

IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not IN_INTERPRETER, reason="runs in Triton's interpreter")
outside = pytest.mark.skipif(IN_INTERPRETER, reason="starts Triton's interpreter")


def on_a_gpu(dtype: torch.dtype) -> Any:
    return SimpleNamespace(is_cuda=True, dtype=dtype)


@outside
def test_exact_products_are_asked_for_and_need_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    x = on_a_gpu(torch.bfloat16)
    monkeypatch.setattr(_exact.triton_kernels, "installed", lambda: True)
    monkeypatch.delenv("HYBRID_KERNELS_EXACT", raising=False)
    assert not _exact.exact(x)
    monkeypatch.setenv("HYBRID_KERNELS_EXACT", "1")
    assert _exact.exact(x)
    assert not _exact.exact(torch.zeros(1))  # on the CPU they always are
    monkeypatch.setattr(_exact.triton_kernels, "installed", lambda: False)
    with pytest.raises(RuntimeError, match="needs Triton"):
        _exact.exact(x)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors take the way of tensors on a GPU; the interpreter serves them."""
    linear, head = (importlib.import_module(f"hybrid_kernels.ops.{m}") for m in ("linear", "head"))
    for module in (linear, head):
        monkeypatch.setattr(module, "exact", lambda tensor: True)
    with torch.library._scoped_library("hybrid_kernels_triton", "IMPL") as library:
        library.impl("linear", _exact.linear_kernel, "CPU")
        yield


@interpreted
def test_the_wrapper_runs_and_differentiates_them(as_on_a_gpu: None) -> None:
    from hybrid_kernels import reference

    x, weight, bias = products(8, 20, 30, 40, torch.float32)
    rng = torch.Generator().manual_seed(9)
    lora_a, lora_b = torch.randn(4, 40, generator=rng), torch.randn(30, 2, generator=rng)
    leaves = [t.requires_grad_() for t in (x, weight, bias, lora_a, lora_b)]
    grad = torch.randn(20, 30, generator=rng)
    ours, plain = (f(*leaves, 2.0, [10, 20]) for f in (ops.linear, reference.linear))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-4)
    for a, b in zip(*(torch.autograd.grad(y, leaves, grad) for y in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@interpreted
def test_drawn_tokens_score_what_they_were_drawn_with(as_on_a_gpu: None) -> None:
    """What exact mode promises: one row and many have the same bits, so the ratio is 1."""
    hidden, weight, _ = products(10, 70, 200, 32, torch.float32)
    ids, rule = torch.arange(70), (0.8, 0, 1.0, 3)
    drawn = [
        ops.linear_sample(hidden[i : i + 1], weight, *rule, ids[i : i + 1], ids[i : i + 1])
        for i in range(0, 70, 9)
    ]
    tokens = torch.cat([sample.token for sample in drawn])
    leaf = hidden[::9].clone().requires_grad_()
    logprobs, _ = ops.linear_token_logprobs(leaf, weight, tokens, 0.8, chunk_rows=3)
    assert torch.equal(logprobs.detach(), torch.cat([sample.logprob for sample in drawn]))
    logprobs.sum().backward()
    again = hidden[::9].clone().requires_grad_()
    scores, _ = reference_scores(again @ weight.T, tokens, 0.8)
    scores.sum().backward()
    torch.testing.assert_close(leaf.grad, again.grad, rtol=1e-4, atol=1e-4)


@outside
def test_everything_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]


def products(seed: int, rows: int, outputs: int, width: int, dtype: torch.dtype) -> Any:
    rng = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, width, generator=rng), torch.randn(outputs, width, generator=rng)
    return x.to(dtype), weight.to(dtype), torch.randn(outputs, generator=rng).to(dtype)


def assert_about_as_accurate(actual: Any, exact: Any, plain: Any) -> None:
    """At most twice the error of plain torch in the dtype, plus one unit in the last place of the
    largest result.
    """
    unit = torch.finfo(plain.dtype).eps * float(exact.abs().max())
    allowed = 2 * float((plain.double() - exact).abs().max()) + unit
    assert float((actual.double() - exact).abs().max()) <= allowed


# The interpreter multiplies the bit patterns of bfloat16: that type is compiled only (`gate`).
HALVES_AND_FLOATS = (torch.float32, torch.float16)


@interpreted
@pytest.mark.parametrize("dtype", HALVES_AND_FLOATS)
@pytest.mark.parametrize(
    ("rows", "outputs", "width"),
    [(1, 1, 1), (3, 5, 17), (63, 127, 64), (64, 128, 65), (65, 129, 200), (130, 300, 31)],
)
def test_products(rows: int, outputs: int, width: int, dtype: torch.dtype) -> None:
    from hybrid_kernels.triton_kernels.linear import linear

    x, weight, bias = products(rows, rows, outputs, width, dtype)
    exact = x.double() @ weight.double().T + bias.double()
    plain = x @ weight.T + bias
    assert_about_as_accurate(linear(x, weight, bias, None, None, 1.0, []), exact, plain)
    unrounded = linear(x, weight, None, None, None, 1.0, [], float_output=True)
    assert unrounded.dtype is torch.float32
    exact = x.double() @ weight.double().T
    assert_about_as_accurate(unrounded, exact, x.float() @ weight.float().T)


@interpreted
@pytest.mark.parametrize("dtype", HALVES_AND_FLOATS)
@pytest.mark.parametrize("rank", [1, 16, 37])
def test_low_rank_terms_of_several_splits(rank: int, dtype: torch.dtype) -> None:
    from hybrid_kernels import reference
    from hybrid_kernels.triton_kernels.linear import linear

    x, weight, bias = products(1, 33, 130, 70, dtype)
    splits = [100, 7, 23]
    rng = torch.Generator().manual_seed(2)
    lora_a = torch.randn(3 * rank, 70, generator=rng).to(dtype)
    lora_b = torch.randn(130, rank, generator=rng).to(dtype)
    arguments = (x, weight, bias, lora_a, lora_b)
    exact = reference.linear(*(t.double() for t in arguments), 0.5, splits)
    plain = reference.linear(*arguments, 0.5, splits)
    assert_about_as_accurate(linear(*arguments, 0.5, splits), exact, plain)


@interpreted
@pytest.mark.parametrize("dtype", HALVES_AND_FLOATS)
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype) -> None:
    from hybrid_kernels.triton_kernels.linear import linear

    x, weight, bias = products(3, 150, 140, 90, dtype)
    whole = linear(x, weight, bias, None, None, 1.0, [])
    for first, last in ((0, 1), (5, 22), (64, 128), (149, 150)):
        part = linear(x[first:last], weight, bias, None, None, 1.0, [])
        assert torch.equal(part, whole[first:last])


@interpreted
def test_strided_and_empty_rows_and_bad_shapes() -> None:
    from hybrid_kernels.triton_kernels.linear import linear

    x, weight, bias = products(4, 6, 10, 20, torch.float32)
    wide = torch.cat([x, x], dim=1)
    dense = linear(x, weight, bias, None, None, 1.0, [])
    assert torch.equal(linear(wide[:, :20], weight, bias, None, None, 1.0, []), dense)
    assert linear(x[:0], weight, bias, None, None, 1.0, []).shape == (0, 10)
    assert linear(x.view(2, 3, 20), weight, None, None, None, 1.0, []).shape == (2, 3, 10)
    with pytest.raises(ValueError, match=r"weight is \[10, 19\]"):
        linear(x, weight[:, :19], None, None, None, 1.0, [])
