"""Cases of the sampling family."""

from __future__ import annotations

from typing import Any

import torch

from hybrid_kernels.ops import head, sampling
from hybrid_kernels.reference import sampling as reference
from hybrid_kernels.testing import Args, BadInput, OpCase, Shape, assert_as_accurate

TEMPERATURE = 0.7


def _score_inputs(shape: Shape, rng: torch.Generator) -> Args:
    logits = 3 * shape.randn(rng, shape.rows, shape.cols)
    return logits, torch.randint(shape.cols, (shape.rows,), generator=rng), TEMPERATURE


def _gap(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Thresholds in the widest gap of each row's upper half, which no rounding of logits crosses,
    and targets above them.
    """
    ordered, tokens = logits.double().sort(-1, descending=True)
    half = ordered[:, : max(logits.shape[1] // 2, 2)]
    if half.shape[1] < 2:
        return torch.full(logits.shape[:1], -torch.inf), tokens[:, 0]
    place = half.diff(dim=-1).argmin(-1, keepdim=True)
    above, below = half.gather(1, place), half.gather(1, place + 1)
    return ((above + below) / 2).squeeze(1).float(), tokens.gather(1, place // 2).squeeze(1)


def _kept_inputs(shape: Shape, rng: torch.Generator) -> Args:
    logits, _, temperature = _score_inputs(shape, rng)
    thresholds, targets = _gap(logits)
    return logits, targets, temperature, thresholds


def _backward_inputs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    thresholds: torch.Tensor | None = None,
) -> Args:
    _, entropy = reference.token_logprobs(logits, targets, temperature, thresholds)
    lse = (logits.double() / temperature).logsumexp(-1)
    if thresholds is None:
        thresholds = torch.full_like(entropy, -torch.inf)
    return entropy.cos(), entropy.sin(), logits, targets, entropy, lse, thresholds, temperature


def _head_inputs(shape: Shape, rng: torch.Generator) -> Args:
    hidden = shape.randn(rng, shape.rows, 24)
    weight = shape.randn(rng, shape.cols, 24)
    targets = torch.randint(shape.cols, (shape.rows,), generator=rng)
    return hidden, weight, targets, TEMPERATURE, None, 8


def _kept_head_inputs(shape: Shape, rng: torch.Generator) -> Args:
    hidden, weight, _, temperature, _, chunk = _head_inputs(shape, rng)
    thresholds, targets = _gap(hidden.double() @ weight.double().T)
    return hidden, weight, targets, temperature, thresholds, chunk


def _head_reference(hidden, weight, targets, temperature, thresholds, _chunk_rows):
    return reference.token_logprobs(hidden @ weight.T, targets, temperature, thresholds)


def _head_sample_inputs(shape: Shape, rng: torch.Generator) -> Args:
    """Of sixteenths, whose products and sums are exact: the draw is tested, not the product."""
    hidden, weight = ((16 * t).round() / 16 for t in _head_inputs(shape, rng)[:2])
    return hidden, weight, *_sample_inputs(TEMPERATURE, 9, 0.9)(shape, rng)[1:]


def _head_sample_reference(hidden, weight, *rule):
    return reference.sample(hidden @ weight.T, *rule)


def _sample_inputs(temperature: float, top_k: int, top_p: float):
    def make(shape: Shape, rng: torch.Generator) -> Args:
        logits = 3 * shape.randn(rng, shape.rows, shape.cols)
        ids = torch.randint(2**62, (shape.rows,), generator=rng)
        positions = torch.randint(4096, (shape.rows,), generator=rng)
        return logits, temperature, top_k, top_p, 11, ids, positions

    return make


def _same_draw(actual: Any, exact: Any, plain: Any, factor: float) -> None:
    """The same tokens as the float64 reference, and numbers as good as plain float32's.

    The reference forms the kept mass in float64 whatever its arguments; here it is the quotient of
    two sums, each as good as a log-probability.
    """
    got, want, ordinary = (sampling.Sample(*result) for result in (actual, exact, plain))
    torch.testing.assert_close(got.token, want.token, rtol=0, atol=0)
    torch.testing.assert_close(got.kept_mass.double(), want.kept_mass.double(), rtol=1e-6, atol=0)
    for name in ("logprob", "entropy", "threshold", "kept_logprob"):
        assert_as_accurate(*(getattr(s, name) for s in (got, want, ordinary)), factor)


def _with(position: int, value: Any):
    return lambda *args: (*args[:position], value, *args[position + 1 :])


def _sample_case(name: str, temperature: float, top_k: int, top_p: float, **extra: Any) -> OpCase:
    return OpCase(
        name=name,
        function=sampling.sample,
        reference=reference.sample,
        make_inputs=_sample_inputs(temperature, top_k, top_p),
        operators={"sample": lambda *args: args},
        compare=_same_draw,
        **extra,
    )


CASES = [
    OpCase(
        name="token_logprobs",
        function=sampling.token_logprobs,
        reference=reference.token_logprobs,
        make_inputs=_score_inputs,
        operators={
            "token_logprobs": lambda *args: (*args, None),
            "token_logprobs_backward": _backward_inputs,
        },
        differentiable=(0,),
        bad_inputs=(
            BadInput(
                "targets-too-few",
                _with(1, torch.zeros(2, dtype=torch.int64)),
                r"^token_logprobs: targets has shape \[2\]; expected \[N\] with N=3 \(from logits",
            ),
            BadInput(
                "target-outside",
                _with(1, torch.tensor([0, 123, 5])),
                r"^token_logprobs: targets\[1\] is 123; expected 0 <= target < V=123",
            ),
            BadInput(
                "int32", _with(1, torch.zeros(3, dtype=torch.int32)), r"targets has dtype Int"
            ),
            BadInput("cold", _with(2, 0.0), r"temperature is 0; expected a finite number >= 1e-06"),
            BadInput("infinite", _with(2, float("inf")), r"temperature is inf"),
        ),
    ),
    OpCase(
        name="token_logprobs:thresholds",
        function=sampling.token_logprobs,
        reference=reference.token_logprobs,
        make_inputs=_kept_inputs,
        operators={
            "token_logprobs": lambda *args: args,
            "token_logprobs_backward": _backward_inputs,
        },
        differentiable=(0,),
        bad_inputs=(
            BadInput("thresholds-too-few", _with(3, torch.zeros(2)), r"thresholds has shape \[2\]"),
            BadInput(
                "nan",
                _with(3, torch.tensor([0.0, torch.nan, 0.0])),
                r"^token_logprobs: thresholds\[1\] is NaN",
            ),
        ),
    ),
    OpCase(
        name="linear_token_logprobs",
        function=head.linear_token_logprobs,
        reference=_head_reference,
        make_inputs=_head_inputs,
        operators={"linear_token_logprobs": lambda *args: args},
        differentiable=(0, 1),
        bad_inputs=(
            BadInput("no-chunk", _with(5, 0), r"chunk_rows is 0; expected at least 1"),
            BadInput(
                "targets-too-few",
                _with(2, torch.zeros(2, dtype=torch.int64)),
                r"^linear_token_logprobs: targets has shape \[2\]; expected \[N\] with N=3",
            ),
            BadInput(
                "target-outside",
                _with(2, torch.tensor([0, 123, 5])),
                r"^linear_token_logprobs: targets\[1\] is 123; expected 0 <= target < V=123",
            ),
            BadInput("cold", _with(3, 0.0), r"^linear_token_logprobs: temperature is 0"),
        ),
    ),
    OpCase(
        name="linear_token_logprobs:thresholds",
        function=head.linear_token_logprobs,
        reference=_head_reference,
        make_inputs=_kept_head_inputs,
        operators={"linear_token_logprobs": lambda *args: args},
        differentiable=(0, 1),
    ),
    OpCase(
        name="linear_sample",
        function=head.linear_sample,
        reference=_head_sample_reference,
        make_inputs=_head_sample_inputs,
        operators={"linear_sample": lambda *args: args},
        compare=_same_draw,
        bad_inputs=(
            BadInput("negative-k", _with(3, -1), r"^linear_sample: top_k is -1"),
            BadInput(
                "width",
                _with(0, torch.zeros(3, 25)),
                r"^linear_sample: weight has shape \[123, 24\]; expected \[V, K\] with K=25",
            ),
            BadInput(
                "nan",
                _with(0, torch.full((3, 24), torch.nan)),
                r"^linear_sample: the logits of row 0 are no distribution",
            ),
        ),
    ),
    _sample_case(
        "sample",
        TEMPERATURE,
        0,
        1.0,
        bad_inputs=(
            BadInput(
                "negative-k", _with(2, -1), r"^sample: top_k is -1; expected 0 \(all\) or more"
            ),
            BadInput("no-mass", _with(3, 0.0), r"^sample: top_p is 0; expected 0 < top_p <= 1"),
            BadInput("too-cold", _with(1, 1e-9), r"^sample: temperature is 1e-09"),
            BadInput(
                "nan",
                _with(0, torch.full((3, 123), torch.nan)),
                r"^sample: the logits of row 0 are no distr",
            ),
            BadInput(
                "impossible",
                _with(0, torch.full((3, 123), -torch.inf)),
                r"^sample: the logits of row 0 are no distribution",
            ),
            BadInput(
                "position",
                _with(6, torch.tensor([0, -1, 0])),
                r"^sample: positions\[1\] is -1; expected 0 <= position < 2\^32",
            ),
            BadInput(
                "ids-too-few",
                _with(5, torch.zeros(2, dtype=torch.int64)),
                r"^sample: sample_ids has shape \[2\]; expected \[N\] with N=3 \(from logits\)",
            ),
        ),
    ),
    _sample_case("sample:greedy", 0.0, 5, 0.5),
    _sample_case("sample:top-k", TEMPERATURE, 7, 1.0),
    _sample_case("sample:top-p", TEMPERATURE, 0, 0.8),
    _sample_case("sample:top-k-top-p", 1.3, 50, 0.9),
]
