"""From a batch of token sequences to packed forward passes of bounded size, the same number of them
on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_engine.distributed.collectives import all_reduce_max
from hybrid_engine.models.packing import PackedBatch, last_rows, pack, span_rows

Spans = Sequence[tuple[int, int]]  # the places [begin, end) of a sequence that are scored


@dataclass(frozen=True)
class Pass:
    """One packed forward pass over some samples of a batch.

    Attributes:
        samples: the samples' places in the batch, in packing order; empty for a pass that only
            keeps ranks in step.
        batch: the packed sequences; those with one prompt may share its rows.
        rows: [N] packed rows whose next token is scored, sample after sample.
        targets: [N] those next tokens.
        last: [len(samples)] packed row of each sequence's last token.
    """

    samples: list[int]
    batch: PackedBatch
    rows: Tensor
    targets: Tensor
    last: Tensor


def pack_pass(
    sequences: Sequence[list[int]],
    spans: Sequence[Spans],
    samples: list[int],
    prompt_lengths: Sequence[int] | None = None,
) -> Pass:
    prompts = None if prompt_lengths is None else [prompt_lengths[i] for i in samples]
    batch = pack([sequences[i] for i in samples], prompts)
    rows, targets = span_rows(batch, [spans[i] for i in samples])
    return Pass(samples, batch, rows, targets, last_rows(batch))


def plan_passes(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Consecutive samples share a pass while their tokens fit; a longer sample has a pass of its
    own.
    """
    plan: list[list[int]] = []
    used = max_tokens + 1
    for i, length in enumerate(lengths):
        if used + length > max_tokens:
            plan.append([])
            used = 0
        plan[-1].append(i)
        used += length
    return plan


def passes(
    sequences: Sequence[list[int]], prompt_lengths: Sequence[int], max_tokens: int, group: int = 1
) -> Iterator[Pass]:
    """Passes that score what follows each prompt. An answer without a prompt is scored from its
    second token: nothing precedes the first. A prompt that several sequences of a pass begin with
    is computed once.
    """
    spans = [
        [(max(prompt, 1), len(sequence))]
        for sequence, prompt in zip(sequences, prompt_lengths, strict=True)
    ]
    return span_passes(sequences, spans, max_tokens, group, prompt_lengths)


def span_passes(
    sequences: Sequence[list[int]],
    spans: Sequence[Spans],
    max_tokens: int,
    group: int = 1,
    prompt_lengths: Sequence[int] | None = None,
) -> Iterator[Pass]:
    """Packs a rank's share of a batch; every `group` consecutive sequences stay together in one
    pass, and equal prompts share rows if `prompt_lengths` are given.

    Under ZeRO-2 every backward and under ZeRO-3 every forward is a collective, so ranks with less
    work run idle passes at the end; how many is agreed on before the first, when no rank is inside
    a pass.
    """
    lengths = [sum(map(len, sequences[i : i + group])) for i in range(0, len(sequences), group)]
    plan = plan_passes(lengths, max_tokens)
    most = int(all_reduce_max(len(plan)))
    for groups in plan:
        samples = [g * group + i for g in groups for i in range(group)]
        yield pack_pass(sequences, spans, samples, prompt_lengths)
    for _ in range(most - len(plan)):
        yield idle_pass()


def idle_pass() -> Pass:
    """A one-token pass that scores nothing."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return Pass([], pack([[0]]), nothing, nothing, nothing)
