"""Cases of the normalisation family."""

from __future__ import annotations

import torch

from hybrid_kernels import ops, reference
from hybrid_kernels.testing import Args, BadInput, OpCase, Shape

EPS = 1e-5


def _norm_inputs(extra: int, residual: bool):
    def make(shape: Shape, rng: torch.Generator) -> Args:
        def rows():
            return shape.randn(rng, shape.rows, shape.cols) + 0.5

        def vector():
            return shape.randn(rng, shape.cols)

        return (rows(), *((rows(),) if residual else ()), *(vector() for _ in range(extra)), EPS)

    return make


def _with(position: int, value):
    return lambda *args: (*args[:position], value(args[position]), *args[position + 1 :])


def _backward_rms(x, weight, eps):
    rstd = torch.rsqrt(x.square().mean(-1) + eps)
    return x.cos(), x, weight, rstd


def _backward_layer(x, weight, bias, eps):
    return x.cos(), x, weight, x.mean(-1), torch.rsqrt(x.var(-1, unbiased=False) + eps)


CASES = [
    OpCase(
        name="rms_norm",
        function=ops.rms_norm,
        reference=reference.rms_norm,
        make_inputs=_norm_inputs(1, residual=False),
        operators={"rms_norm": lambda *args: args, "rms_norm_backward": _backward_rms},
        differentiable=(0, 1),
        bad_inputs=(
            BadInput(
                "weight-too-long",
                _with(1, lambda w: torch.ones(w.numel() + 1)),
                r"^rms_norm: weight has shape \[124\]; expected \[N\] with N=123 \(from x\)$",
            ),
            BadInput(
                "scalar",
                _with(0, lambda x: torch.tensor(1.0)),
                r"x has shape \[\]; expected \[\.\.\., N\]",
            ),
        ),
    ),
    OpCase(
        name="add_rms_norm",
        function=ops.add_rms_norm,
        reference=reference.add_rms_norm,
        make_inputs=_norm_inputs(1, residual=True),
        operators={"add_rms_norm": lambda *args: args},
        differentiable=(0, 1, 2),
        bad_inputs=(
            BadInput(
                "fewer-rows",
                _with(1, lambda r: r[:-1]),
                r"^add_rms_norm: residual has shape \[2, 123\]; expected \[\.\.\., N\] with"
                r" \.\.\.=\[3\] \(from x\), N=123 \(from x\)$",
            ),
        ),
    ),
    OpCase(
        name="layer_norm",
        function=ops.layer_norm,
        reference=reference.layer_norm,
        make_inputs=_norm_inputs(2, residual=False),
        operators={"layer_norm": lambda *args: args, "layer_norm_backward": _backward_layer},
        differentiable=(0, 1, 2),
        bad_inputs=(
            BadInput(
                "bias-matrix",
                _with(2, lambda b: b[None]),
                r"^layer_norm: bias has shape \[1, 123\]; expected \[N\] with N=123 \(from x\)$",
            ),
        ),
    ),
    OpCase(
        name="add_layer_norm",
        function=ops.add_layer_norm,
        reference=reference.add_layer_norm,
        make_inputs=_norm_inputs(2, residual=True),
        operators={"add_layer_norm": lambda *args: args},
        differentiable=(0, 1, 2, 3),
        bad_inputs=(
            BadInput(
                "shorter-row",
                _with(1, lambda r: r[:, 1:]),
                r"^add_layer_norm: residual has shape \[3, 122\]",
            ),
        ),
    ),
]
