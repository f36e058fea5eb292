"""Cases of the linear family."""

from __future__ import annotations

import torch

from hybrid_kernels import ops, reference
from hybrid_kernels.testing import Args, BadInput, OpCase, Shape

OUT = 37  # output features: no multiple of any vector


def _plain(shape: Shape, rng: torch.Generator) -> Args:
    x, weight = shape.randn(rng, shape.rows, shape.cols), shape.randn(rng, OUT, shape.cols)
    return x, weight, shape.randn(rng, OUT)


def _low_rank(shape: Shape, rng: torch.Generator) -> Args:
    splits, rank = [20, 9, 8], 5
    lora_a = shape.randn(rng, len(splits) * rank, shape.cols)
    lora_b = shape.randn(rng, OUT, rank)
    return *_plain(shape, rng), lora_a, lora_b, 0.5, splits


def _product(shape: Shape, rng: torch.Generator) -> Args:
    return shape.randn(rng, shape.rows, OUT).T, shape.randn(
        rng, shape.rows, shape.cols
    )  # as for a weight's gradient


def _full(*args):
    defaults = (None, None, None, 1.0, [])
    return (*args, *defaults[len(args) - 2 :])


def _spoil(position: int, value):
    return lambda *args: (*args[:position], value, *args[position + 1 :])


CASES = [
    OpCase(
        name="linear",
        function=ops.linear,
        reference=reference.linear,
        make_inputs=_plain,
        operators={"linear": _full},
        differentiable=(0, 1, 2),
        bad_inputs=(
            BadInput(
                "weight-other-k",
                _spoil(1, torch.ones(OUT, 122)),
                r"^linear: weight has shape \[37, 122\]; expected \[N, K\] with K=123 \(from x\)",
            ),
            BadInput(
                "bias-too-short",
                _spoil(2, torch.ones(36)),
                r"^linear: bias has shape \[36\]; expected \[N\]",
            ),
            BadInput(
                "only-lora-a", lambda *args: (*args, torch.ones(5, 123)), "expected both or none"
            ),
        ),
    ),
    OpCase(
        name="linear:low-rank",
        function=ops.linear,
        reference=reference.linear,
        make_inputs=_low_rank,
        operators={"linear": _full},
        differentiable=(0, 1, 2, 3, 4),
        bad_inputs=(
            BadInput(
                "splits",
                _spoil(6, [20, 9]),
                r"^linear: lora_splits \[20, 9\] sum to 29; expected N=37",
            ),
            BadInput(
                "lora-a",
                _spoil(3, torch.ones(10, 123)),
                r"lora_a has shape \[10, 123\]; expected \[S\*R, K\]",
            ),
        ),
    ),
    OpCase(
        name="matmul",
        function=ops.matmul,
        reference=reference.matmul,
        make_inputs=_product,
        operators={"matmul": lambda *args: args},
        bad_inputs=(
            BadInput(
                "inner",
                _spoil(1, torch.ones(4, 2)),
                r"^matmul: b has shape \[4, 2\]; expected \[K, N\] with K=3",
            ),
        ),
    ),
]
