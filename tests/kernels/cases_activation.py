"""Cases of the activation family: every kind, with and without its partner."""

from __future__ import annotations

import torch

from hybrid_kernels import ops, reference
from hybrid_kernels.testing import Args, BadInput, OpCase, Shape

KINDS = ("relu", "silu", "gelu_tanh", "gelu_erf")


def _bias_inputs(kind: str, with_bias: bool):
    def make(shape: Shape, rng: torch.Generator) -> Args:
        x = 3 * shape.randn(rng, shape.rows, shape.cols)
        return x, shape.randn(rng, shape.cols) if with_bias else None, kind

    return make


def _gated_inputs(kind: str):
    def make(shape: Shape, rng: torch.Generator) -> Args:
        return 3 * shape.randn(rng, shape.rows, 2 * shape.cols), kind

    return make


def _gated_backward(gate_up, kind):
    return gate_up[:, ::2].cos(), gate_up, kind


UNKNOWN = r": activation kind is 'swish'; expected relu, silu, gelu_tanh or gelu_erf$"
BIAS_MISTAKES = (
    BadInput(
        "unknown-kind", lambda x, bias, kind: (x, bias, "swish"), "^bias_activation" + UNKNOWN
    ),
    BadInput(
        "short-bias",
        lambda x, bias, kind: (x, torch.ones(7), kind),
        r"^bias_activation: bias has shape \[7\]; expected \[F\] with F=123 \(from x\)$",
    ),
)
GATED_MISTAKES = (
    BadInput(
        "unknown-kind", lambda gate_up, kind: (gate_up, "swish"), "^gated_activation" + UNKNOWN
    ),
    BadInput(
        "odd-width",
        lambda gate_up, kind: (gate_up[:, 1:], kind),
        "^gated_activation: gate_up has 245 columns; expected an even number$",
    ),
)

CASES = [
    *(
        OpCase(
            name=f"bias_activation:{kind}",
            function=ops.bias_activation,
            reference=reference.bias_activation,
            make_inputs=_bias_inputs(kind, with_bias=True),
            operators={
                "bias_activation": lambda *args: args,
                "bias_activation_backward": lambda x, bias, kind: (x.cos(), x, bias, kind),
            },
            differentiable=(0, 1),
            bad_inputs=BIAS_MISTAKES if kind == "relu" else (),
        )
        for kind in KINDS
    ),
    OpCase(
        name="bias_activation:no-bias",
        function=ops.bias_activation,
        reference=reference.bias_activation,
        make_inputs=_bias_inputs("gelu_erf", with_bias=False),
        operators={"bias_activation": lambda *args: args},
        differentiable=(0,),
    ),
    *(
        OpCase(
            name=f"gated_activation:{kind}",
            function=ops.gated_activation,
            reference=reference.gated_activation,
            make_inputs=_gated_inputs(kind),
            operators={
                "gated_activation": lambda *args: args,
                "gated_activation_backward": _gated_backward,
            },
            differentiable=(0,),
            bad_inputs=GATED_MISTAKES if kind == "relu" else (),
        )
        for kind in KINDS
    ),
]
