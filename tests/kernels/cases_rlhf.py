"""Cases of the RLHF family."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import torch

from hybrid_kernels.ops import rlhf
from hybrid_kernels.reference import rlhf as reference
from hybrid_kernels.testing import Args, BadInput, OpCase, Shape


def _gae_inputs(shape: Shape, rng: torch.Generator) -> Args:
    rewards, values = (shape.randn(rng, shape.rows, shape.cols) for _ in range(2))
    lengths = torch.randint(shape.cols + 1, (shape.rows,), generator=rng)
    return rewards, values, lengths, 0.99, 0.95


def _masked(shape: Shape, rng: torch.Generator) -> Args:
    x = shape.randn(rng, shape.rows, shape.cols) + 2
    return x, torch.rand(shape.rows, shape.cols, generator=rng) < 0.6


def _policy_inputs(dual_clip: float):
    def make(shape: Shape, rng: torch.Generator) -> Args:
        old = shape.randn(rng, shape.rows, shape.cols) - 3
        new = old + 0.4 * shape.randn(rng, shape.rows, shape.cols)
        new[..., ::17] += 30  # beyond the cut of the log ratio
        advantages, mask = _masked(shape, rng)
        return new, old, advantages - 2, mask, 0.2, 0.28, dual_clip

    return make


def _value_inputs(shape: Shape, rng: torch.Generator) -> Args:
    old, returns = (shape.randn(rng, shape.rows, shape.cols) for _ in range(2))
    values, mask = _masked(shape, rng)
    return old + 0.3 * (values - 2), old, returns, mask, 0.2


def _flat(loss: Any):
    """Statistics as a tensor, so that they are compared like any output."""

    def function(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss_sum, stats = loss(*args)
        return loss_sum, torch.tensor(astuple(stats), dtype=torch.float64)

    return function


def _with(position: int, value: Any):
    return lambda *args: (*args[:position], value, *args[position + 1 :])


def _cut_mask(position: int):
    return lambda *args: (*args[:position], args[position][:, 1:], *args[position + 1 :])


def _policy_case(name: str, dual_clip: float, **extra: Any) -> OpCase:
    return OpCase(
        name=name,
        function=_flat(rlhf.ppo_policy_loss),
        reference=reference.ppo_policy_loss,
        make_inputs=_policy_inputs(dual_clip),
        operators={"ppo_policy_loss": lambda *args: args},
        differentiable=(0,),
        **extra,
    )


CASES = [
    OpCase(
        name="gae",
        function=rlhf.gae,
        reference=reference.gae,
        make_inputs=_gae_inputs,
        operators={"gae": lambda *args: args},
        bad_inputs=(
            BadInput(
                "values-shorter",
                _cut_mask(1),
                r"^gae: values has shape \[3, 122\]; expected \[B, T\] with B=3 \(from rewards\)",
            ),
            BadInput(
                "length-too-long",
                _with(2, torch.tensor([1, 2, 124])),
                r"^gae: lengths\[2\] is 124; expected 0 <= length <= T=123",
            ),
        ),
    ),
    OpCase(
        name="masked_moments",
        function=rlhf.masked_moments,
        reference=reference.masked_moments,
        make_inputs=_masked,
        operators={"masked_moments": lambda *args: args},
        bad_inputs=(
            BadInput(
                "float-mask", _with(1, torch.ones(3, 123)), r"mask has dtype Float; expected Bool"
            ),
        ),
    ),
    OpCase(
        name="masked_whiten",
        function=rlhf.masked_whiten,
        reference=reference.masked_whiten,
        make_inputs=lambda shape, rng: (
            *(args := _masked(shape, rng)),
            reference.masked_moments(*args),
            False,
        ),
        operators={"masked_whiten": lambda *args: args},
        bad_inputs=(
            BadInput("mask-shorter", _cut_mask(1), r"^masked_whiten: mask has shape \[3, 122\]"),
            BadInput("moments", _with(2, torch.zeros(2).double()), r"moments has shape \[2\]"),
        ),
    ),
    _policy_case(
        "ppo_policy_loss",
        0.0,
        bad_inputs=(
            BadInput("mask-shorter", _cut_mask(3), r"^ppo_policy_loss: mask has shape \[3, 122\]"),
            BadInput("clip-low", _with(4, 1.5), r"clip_low is 1.5; expected 0 <= clip_low <= 1"),
            BadInput("clip-high", _with(5, -0.1), r"clip_high is -0.1; expected 0 or more"),
            BadInput("dual-clip", _with(6, 0.5), r"dual_clip is 0.5; expected 0 \(off\) or more"),
        ),
    ),
    _policy_case("ppo_policy_loss:dual-clip", 3.0),
    OpCase(
        name="ppo_value_loss",
        function=_flat(rlhf.ppo_value_loss),
        reference=reference.ppo_value_loss,
        make_inputs=_value_inputs,
        operators={"ppo_value_loss": lambda *args: args},
        differentiable=(0,),
        bad_inputs=(
            BadInput("mask-shorter", _cut_mask(3), r"^ppo_value_loss: mask has shape \[3, 122\]"),
            BadInput("clip", _with(4, -1.0), r"clip is -1; expected 0 or more"),
        ),
    ),
]
