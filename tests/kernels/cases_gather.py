"""Cases of the gather family: made from whole parameters, so that the truth is known."""

from __future__ import annotations

import torch

from hybrid_kernels import ops, reference
from hybrid_kernels.testing import Args, BadInput, OpCase, Shape

GAP = 5  # bytes of `out` before, between and after the parameters


def _inputs(shape: Shape, rng: torch.Generator) -> Args:
    """``shape.rows`` ranks; parameters of ``shape.cols`` bytes, of one, of none, and another."""
    ranks = max(shape.rows, 1)
    sizes = [shape.cols, 1, 0, shape.cols // 2]
    parts = [-(-size // ranks) for size in sizes]
    offsets = [GAP + sum(sizes[:p]) + GAP * p for p in range(len(sizes))]
    out = _bytes(shape.randn(rng, offsets[-1] + sizes[-1] + GAP)).contiguous()
    return out, _bytes(shape.randn(rng, ranks, sum(parts))), parts, sizes, offsets


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
    torch.testing.assert_close(actual, plain, rtol=0, atol=0)


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
                lambda out, s, parts, sizes, offsets: (out, s, parts, sizes, offsets[:-1]),
                r"^unshard_: parts, sizes and offsets have 4, 4 and 3 entries; expected one a par",
            ),
            BadInput(
                "part-too-small",
                lambda out, s, parts, sizes, offsets: (out, s, [40, *parts[1:]], sizes, offsets),
                r"^unshard_: sizes\[0\] is 123; expected 0 to 3 \(ranks\) times parts\[0\]=40$",
            ),
            BadInput(
                "columns",
                lambda out, s, parts, sizes, offsets: (out, s[:, 1:], parts, sizes, offsets),
                r"^unshard_: parts sum to 63; expected the 62 columns of shards$",
            ),
            BadInput(
                "overlap",
                lambda out, s, parts, sizes, offsets: (out, s, parts, sizes, [5, 127, 138, 143]),
                r"^unshard_: offsets\[1\] is 127; expected at least 128, the end of the parameter",
            ),
            BadInput(
                "out-too-small",
                lambda out, s, parts, sizes, offsets: (out[:-6], s, parts, sizes, offsets),
                r"^unshard_: the last parameter ends at \d+; expected at most \d+, the size of",
            ),
            BadInput(
                "two-dimensional",
                lambda out, s, parts, sizes, offsets: (out[None], s, parts, sizes, offsets),
                r"^unshard_: out has shape \[1, \d+\]; expected \[E\]",
            ),
        ),
    ),
]
