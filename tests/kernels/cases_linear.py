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


def _activated(kind: str, gated: bool, low_rank: bool):
    def make(shape: Shape, rng: torch.Generator) -> Args:
        outputs, splits, rank = 2 * OUT, [20, 54], 5
        x, weight = shape.randn(rng, shape.rows, shape.cols), shape.randn(rng, outputs, shape.cols)
        layer = x, weight, shape.randn(rng, outputs), kind, gated
        if not low_rank:
            return layer
        lora_a = shape.randn(rng, len(splits) * rank, shape.cols)
        return *layer, lora_a, shape.randn(rng, outputs, rank), 0.5, splits

    return make


def _activation_reference(x, weight, bias, kind, gated, *low_rank):
    defaults = (None, None, 1.0, [])
    wide = reference.linear(x, weight, bias, *(low_rank or defaults))
    return reference.activate(wide, kind, gated)


def _full_activation(x, weight, bias, kind, gated, *low_rank):
    return x, weight, bias, *(low_rank or (None, None, 1.0, [])), kind, gated


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
        name="linear_activation",
        function=ops.linear_activation,
        reference=_activation_reference,
        make_inputs=_activated("gelu_erf", gated=False, low_rank=False),
        operators={"linear_activation": _full_activation},
        bad_inputs=(
            BadInput("kind", _spoil(3, "swish"), r"^linear_activation: .*swish"),
            BadInput(
                "odd",
                lambda x, w, b, kind, gated: (x, w[1:], b[1:], kind, True),
                r"^linear_activation: weight has 73 rows; expected gate and up, an even number",
            ),
        ),
    ),
    OpCase(
        name="linear_activation:gated",
        function=ops.linear_activation,
        reference=_activation_reference,
        make_inputs=_activated("silu", gated=True, low_rank=True),
        operators={"linear_activation": _full_activation},
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
