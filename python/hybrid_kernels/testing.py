"""What every operator is tested with: shapes that break things, an accuracy rule, a case record.

A family lists its `OpCase` records as ``CASES`` in ``tests/kernels/cases_<family>.py``;
``tests/kernels/test_all_ops.py`` walks them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Args = tuple[Any, ...]


@dataclass(frozen=True)
class Shape:
    """A named problem size. A family reads ``rows`` and ``cols`` in its own way."""

    name: str
    rows: int
    cols: int
    contiguous: bool = True

    def randn(self, rng: torch.Generator, *size: int) -> Tensor:
        """Normal numbers; every second one of a wider tensor where not contiguous."""
        if self.contiguous or not size:
            return torch.randn(*size, generator=rng)
        return torch.randn(*size[:-1], 2 * size[-1], generator=rng)[..., ::2]


# 16 is the widest vector, 64 the attention tile and 4 x 16 the unrolled step of the row kernels.
SHAPES: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("one", 1, 1),
        Shape("odd", 3, 123),
        Shape("tile-1", 33, 63),
        Shape("tile", 32, 64),
        Shape("tile+1", 31, 65),
        Shape("empty", 0, 8),
        Shape("long-row", 2, 50021),
        Shape("non-contiguous", 5, 70, contiguous=False),
    )
}


@dataclass(frozen=True)
class BadInput:
    """A mistake and what the library must say about it (a regular expression of the ValueError)."""

    name: str
    spoil: Callable[..., Args]  # good arguments -> bad arguments
    message: str


def as_accurate(actual: Any, exact: Any, plain: Any, factor: float) -> None:
    """The default comparison of an `OpCase`: `assert_as_accurate`, output by output."""
    for got, want, ordinary in zip(
        outputs_of(actual), outputs_of(exact), outputs_of(plain), strict=True
    ):
        assert_as_accurate(got, want, ordinary, factor)


@dataclass(frozen=True)
class OpCase:
    """One public operator under test.

    Attributes:
        name: the wrapper's name, with a variant after a colon where there are several cases.
        function: the wrapper, a pure function of its arguments (a mutating one gets clones).
        reference: the same in plain torch; given float64 arguments it computes in float64.
        make_inputs: ``(shape, rng)`` to float32 CPU arguments.
        operators: schema operators that this case covers, each with a function from the
            wrapper's arguments to the operator's; ``opcheck`` runs on them.
        differentiable: positions of the arguments that get a gradient.
        shapes: names in `SHAPES`.
        bad_inputs: mistakes with their messages.
        factor: allowed multiple of the float32 reference's error.
        compare: ``(actual, exact, plain, factor)``; raises where the outputs differ too much.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    make_inputs: Callable[[Shape, torch.Generator], Args]
    operators: Mapping[str, Callable[..., Args]] = field(default_factory=dict)
    differentiable: tuple[int, ...] = ()
    shapes: tuple[str, ...] = tuple(SHAPES)
    bad_inputs: tuple[BadInput, ...] = ()
    factor: float = 2.0
    compare: Callable[[Any, Any, Any, float], None] = as_accurate

    def inputs(self, shape: str, seed: int = 0) -> Args:
        """The arguments for a named shape; the same for the same seed."""
        return self.make_inputs(SHAPES[shape], torch.Generator().manual_seed(seed))

    def gradients(self, function: Callable[..., Any], args: Args, seed: int = 1) -> list[Tensor]:
        """Gradients of the differentiable arguments for seeded output gradients."""
        leaves = list(args)
        for position in self.differentiable:
            leaves[position] = args[position].detach().requires_grad_()
        outputs = [out for out in outputs_of(function(*leaves)) if out.requires_grad]
        rng = torch.Generator().manual_seed(seed)
        weights = [torch.randn(out.shape, generator=rng).to(out) for out in outputs]
        wanted = [leaves[position] for position in self.differentiable]
        return list(torch.autograd.grad(outputs, wanted, weights))


def assert_as_accurate(actual: Tensor, exact: Tensor, plain: Tensor, factor: float = 2.0) -> None:
    """Asserts that ``actual`` is about as close to the truth as plain float32 torch is.

    ``max|actual - exact| <= factor * max|plain - exact| + one ulp of the largest exact value``.
    The ulp is there because plain torch may hit the exact value by luck. Outputs that are not
    floating must be equal, and so must infinities and NaNs.

    Args:
        actual: float32, what is tested.
        exact: the float64 reference.
        plain: the same reference in float32.
        factor: how many times plain's error is allowed.
    """
    assert actual.shape == exact.shape, f"shape {list(actual.shape)}, expected {list(exact.shape)}"
    if not actual.is_floating_point():
        torch.testing.assert_close(actual, exact.to(actual.dtype), rtol=0, atol=0)
        return
    actual, exact, plain = (t.detach().cpu().double() for t in (actual, exact, plain))
    finite = exact.isfinite()
    torch.testing.assert_close(actual[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True)
    if not finite.any():
        return
    error = (actual - exact)[finite].abs()
    ulp = torch.finfo(torch.float32).eps * exact[finite].abs().max().item()
    allowed = factor * (plain - exact)[finite].abs().nan_to_num(0.0).max().item() + ulp
    worst = int(error.argmax())
    assert error[worst].item() <= allowed, (
        f"error {error[worst].item():.3e} at finite element {worst} of {error.numel()}; "
        f"allowed {allowed:.3e} ({factor} x the error of plain float32, plus one ulp)"
    )


def assert_same_bits(first: Any, second: Any) -> None:
    """Asserts that two results are equal bit for bit (NaNs compare by position)."""
    for a, b in zip(outputs_of(first), outputs_of(second), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def to_double(args: Args) -> Args:
    """The same arguments with floating tensors in float64."""

    def convert(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if floating else value

    return tuple(convert(value) for value in args)


def to_device(args: Args, device: str) -> Args:
    """The same arguments with tensors on ``device``."""
    return tuple(value.to(device) if isinstance(value, Tensor) else value for value in args)


def available_devices() -> list[str]:
    """``cpu``, and ``cuda`` where there is one."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def outputs_of(result: Any) -> list[Tensor]:
    """The tensors of a result: one, or those of a (named) tuple or dataclass."""
    if isinstance(result, Tensor):
        return [result]
    if hasattr(result, "__dataclass_fields__"):
        result = tuple(getattr(result, name) for name in result.__dataclass_fields__)
    found: list[Tensor] = []
    for item in result:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, tuple | list) or hasattr(item, "__dataclass_fields__"):
            found += outputs_of(item)
    return found
