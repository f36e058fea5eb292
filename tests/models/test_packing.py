"""Packed batches against lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_engine.models import PackedBatch, last_rows, pack, response_rows, span_rows, unpack

SEQUENCES = st.lists(st.lists(st.integers(0, 999), max_size=7), max_size=6)


@given(SEQUENCES)
def test_unpack_inverts_pack(sequences: list[list[int]]) -> None:
    batch = pack(sequences)
    assert [part.tolist() for part in unpack(batch.input_ids, batch)] == sequences
    assert batch.positions.tolist() == [i for s in sequences for i in range(len(s))]
    assert batch.longest == max(map(len, sequences), default=0)
    unsaid = PackedBatch(batch.input_ids, batch.positions, batch.cu_seqlens)
    assert unsaid.longest == batch.longest
    assert (batch.input_ids.dtype, batch.positions.dtype, batch.cu_seqlens.dtype) == (
        torch.int64,
        torch.int32,
        torch.int32,
    )


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), max_size=5))
def test_response_rows_precede_their_targets(shapes: list[tuple[int, int]]) -> None:
    sequences = [[100 * i + j for j in range(p + r)] for i, (p, r) in enumerate(shapes)]
    batch = pack(sequences)
    rows, targets = response_rows(batch, [prompt for prompt, _ in shapes])
    expected = [t for s, (prompt, _) in zip(sequences, shapes, strict=True) for t in s[prompt:]]
    assert targets.tolist() == expected
    assert (batch.input_ids[rows] + 1).tolist() == expected  # tokens count upwards in a sequence
    assert batch.input_ids[last_rows(batch)].tolist() == [s[-1] for s in sequences]


@pytest.mark.parametrize("prompt", [0, 4])
def test_a_prompt_outside_its_sequence_is_refused(prompt: int) -> None:
    with pytest.raises(ValueError, match=rf"prompt length {prompt} outside 1\.\.3"):
        response_rows(pack([[1, 2, 3]]), [prompt])


@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), max_size=4))
def test_span_rows_are_the_rows_of_all_spans(gaps: list[list[int]]) -> None:
    """Each gap is followed by as many targets; a context token comes first."""
    sequences, spans, expected = [], [], []
    for i, sizes in enumerate(gaps):
        sequence, parts = [1000 * i], []
        for size in sizes:
            sequence += range(sequence[-1] + 1, sequence[-1] + 1 + size)
            parts.append((len(sequence), len(sequence) + size))
            sequence += range(sequence[-1] + 1, sequence[-1] + 1 + size)
            expected += sequence[len(sequence) - size :]
        sequences.append(sequence)
        spans.append(parts)
    batch = pack(sequences)
    rows, targets = span_rows(batch, spans)
    assert targets.tolist() == expected
    assert (batch.input_ids[rows] + 1).tolist() == expected  # tokens count upwards


@pytest.mark.parametrize("span", [(0, 2), (2, 4), (3, 2)])
def test_a_span_outside_its_sequence_is_refused(span: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"span {span[0]}\.\.{span[1]} outside 1\.\.3"):
        span_rows(pack([[1, 2, 3]]), [[span]])
    with pytest.raises(ValueError, match="spans of 1 sequences for 2 sequences"):
        span_rows(pack([[1], [2]]), [[]])


def test_one_prompt_length_a_sequence() -> None:
    with pytest.raises(ValueError, match="1 prompt lengths for 2 sequences"):
        response_rows(pack([[1], [2]]), [1])
