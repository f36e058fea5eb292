"""Cases of the gather family: made from whole parameters, so that the truth is known."""

from __future__ import annotations

import torch

from hybrid_kernels import ops, reference
from hybrid_kernels.testing import Args, BadInput, OpCase, Shape, assert_same_bits

GAP = 5  # bytes of `out` before, between and after the parameters


def _inputs(shape: Shape, rng: torch.Generator) -> Args:
    """``shape.rows`` ranks; parameters of ``shape.cols`` bytes, of one, of none, and another.

    Of the first, the middle and the end once more, as a rank that needs no more would take them.
    """
    ranks, cols = max(shape.rows, 1), shape.cols
    whole = [cols, 1, 0, cols // 2]
    held = [-(-size // ranks) for size in whole]
    begins = [sum(held[:p]) for p in range(len(held))]
    columns, parts = [*begins, 0, 0], [*held, held[0], held[0]]
    starts = [0, 0, 0, 0, cols // 3, cols - cols // 4]
    sizes = [*whole, cols // 2 - cols // 3, cols // 4]
    offsets = [GAP + sum(sizes[:r]) + GAP * r for r in range(len(sizes))]
    out = _bytes(shape.randn(rng, offsets[-1] + sizes[-1] + GAP)).contiguous()
    shards = _bytes(shape.randn(rng, ranks, sum(held)))
    if cols % 2:  # whole rows of wider ones, which are read where they lie
        shards = torch.nn.functional.pad(shards, (0, GAP))[:, : sum(held)]
    return out, shards, columns, parts, starts, sizes, offsets


def _changed(place: int, change):
    """The arguments with the one at ``place`` changed."""

    def change_inputs(*arguments):
        return (*arguments[:place], change(arguments[place]), *arguments[place + 1 :])

    return change_inputs


def _bytes(numbers: torch.Tensor) -> torch.Tensor:
    """Every fourth byte of the numbers: strided, like they may be."""
    return numbers.contiguous().view(torch.uint8)[..., ::4]


def _unsharded(function):
    def run(out, *arguments):
        clone = out.clone()
        function(clone, *arguments)
        return clone

    return run


def _exactly(actual, exact, plain, factor):
    assert_same_bits(actual, plain)


CASES = [
    OpCase(
        name="unshard_",
        function=_unsharded(ops.unshard_),
        reference=_unsharded(reference.unshard_),
        make_inputs=_inputs,
        operators={"unshard_": lambda out, *arguments: (out.clone(), *arguments)},
        compare=_exactly,
        bad_inputs=(
            BadInput(
                "one-offset-short",
                _changed(6, lambda offsets: offsets[:-1]),
                r"^unshard_: a list has 5 entries where columns has 6; expected one a run",
            ),
            BadInput(
                "part-too-small",
                _changed(3, lambda parts: [40, *parts[1:]]),
                r"^unshard_: starts\[0\] is 0 and sizes\[0\] is 123; expected them to end within "
                r"3 \(ranks\) times parts\[0\]=40$",
            ),
            BadInput(
                "start-too-late",
                _changed(4, lambda starts: [*starts[:-1], 100]),
                r"^unshard_: starts\[5\] is 100 and sizes\[5\] is 30; expected them to end within",
            ),
            BadInput(
                "columns",
                _changed(1, lambda shards: shards[:, 1:]),
                r"^unshard_: columns\[3\] is 42 and parts\[3\] is 21; expected them to end within "
                r"the 62 columns of shards$",
            ),
            BadInput(
                "overlap",
                _changed(6, lambda offsets: [offsets[0], offsets[1] - GAP - 1, *offsets[2:]]),
                r"^unshard_: offsets\[1\] is 127; expected at least 128, the end of the run before",
            ),
            BadInput(
                "out-too-small",
                _changed(0, lambda out: out[: -GAP - 1]),
                r"^unshard_: the last run ends at \d+; expected at most \d+, the size of out",
            ),
            BadInput(
                "two-dimensional",
                _changed(0, lambda out: out[None]),
                r"^unshard_: out has shape \[1, \d+\]; expected \[E\]",
            ),
        ),
    ),
]
