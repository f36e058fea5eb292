"""Cases of the LoRA family. The mutating pair runs on clones; test_lora.py is about its bytes."""

from __future__ import annotations

import torch

from hybrid_kernels.ops import lora
from hybrid_kernels.ops._dispatch import native_operator
from hybrid_kernels.reference import lora as reference
from hybrid_kernels.testing import Args, BadInput, OpCase, Shape

RANK = 5


def _inputs(shape: Shape, rng: torch.Generator) -> Args:
    """Three uneven splits of ``shape.cols`` outputs (one of few), ``shape.rows`` inputs."""
    outputs, inputs = shape.cols, shape.rows
    first, second = outputs // 2, outputs // 4
    splits = [first, second, outputs - first - second] if outputs >= 4 else [outputs]
    weight = shape.randn(rng, outputs, inputs)
    lora_a = shape.randn(rng, len(splits) * RANK, inputs)
    lora_b = shape.randn(rng, outputs, RANK)
    return weight, lora_a, lora_b, 0.3, splits


def _merged_clone(weight, *factors):
    merged = weight.clone(memory_format=torch.contiguous_format)
    lora.lora_merge_(merged, *factors)
    return merged


def _there_and_back(weight, *factors):
    clone = weight.clone(memory_format=torch.contiguous_format)
    lora.lora_unmerge_(clone, *factors, lora.lora_merge_(clone, *factors))
    return clone


def _merge_operator(weight, *factors):
    return weight.clone(memory_format=torch.contiguous_format), *factors


def _unmerge_operator(weight, *factors):
    merged = weight.clone(memory_format=torch.contiguous_format)
    return merged, *factors, *native_operator("lora_merge_")(merged, *factors)


CASES = [
    OpCase(
        name="lora_merge",
        function=lora.lora_merge,
        reference=reference.lora_merge,
        make_inputs=_inputs,
        operators={"lora_merge": lambda *args: args},
        bad_inputs=(
            BadInput(
                "splits-short",
                lambda w, a, b, s, _: (w, a, b, s, [61, 30, 31]),
                r"^lora_merge: splits \[61, 30, 31\] sum to 122; expected N=123",
            ),
            BadInput(
                "one-split-too-few",
                lambda w, a, b, s, _: (w, a, b, s, [61, 62]),
                r"^lora_merge: lora_a has shape \[15, 3\]; expected \[S\*R, K\] with S\*R=10",
            ),
            BadInput(
                "bfloat16-rank",
                lambda w, a, b, s, splits: (w.to(torch.bfloat16), a, b[:, :1], s, splits),
                r"^lora_merge: lora_a has shape \[15, 3\]; expected \[S\*R, K\] with S\*R=3",
            ),
        ),
    ),
    OpCase(
        name="lora_merge_",
        function=_merged_clone,
        reference=reference.lora_merge,
        make_inputs=_inputs,
        operators={"lora_merge_": _merge_operator},
        bad_inputs=(
            BadInput(
                "rank",
                lambda w, a, b, s, splits: (w, a, b[:, 1:], s, splits),
                r"^lora_merge_: lora_a has shape",
            ),
        ),
    ),
    OpCase(
        name="lora_unmerge_",
        function=_there_and_back,
        reference=lambda weight, *factors: weight,
        make_inputs=_inputs,
        operators={"lora_unmerge_": _unmerge_operator},
        bad_inputs=(
            BadInput(
                "weight-transposed",
                lambda w, a, b, s, splits: (w.T, a, b, s, splits),
                r"lora_merge_: lora_b has shape \[123, 5\]; expected \[N, R\] with N=3",
            ),
        ),
    ),
]
