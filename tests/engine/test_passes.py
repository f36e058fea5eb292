"""Packing a batch into bounded forward passes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_engine.engine.passes import passes, plan_passes, span_passes


@given(st.lists(st.integers(1, 20)), st.integers(1, 30))
def test_a_plan_is_a_partition_within_the_limit(lengths, limit):
    plan = plan_passes(lengths, limit)
    assert [i for samples in plan for i in samples] == list(range(len(lengths)))
    assert all(len(samples) == 1 or sum(lengths[i] for i in samples) <= limit for samples in plan)
    for left, right in zip(plan, plan[1:], strict=False):
        assert sum(lengths[i] for i in left) + lengths[right[0]] > limit


def test_rows_predict_exactly_the_answers():
    sequences = [[5, 6, 7, 8], [1, 2], [9, 3, 4]]
    (only,) = passes(sequences, [2, 1, 0], max_tokens=100)
    assert only.samples == [0, 1, 2]
    assert only.targets.tolist() == [7, 8, 2, 3, 4]
    assert torch.equal(only.batch.input_ids[only.rows + 1], only.targets)
    assert only.last.tolist() == [3, 5, 8]


def test_spans_are_scored_and_what_is_between_them_is_not():
    sequences = [[5, 6, 7, 8, 9], [1, 2], [3, 4, 5, 6]]
    spans = [[(1, 2), (4, 5)], [], [(2, 4)]]
    (only,) = span_passes(sequences, spans, max_tokens=100)
    assert only.targets.tolist() == [6, 9, 5, 6]
    assert torch.equal(only.batch.input_ids[only.rows + 1], only.targets)
    apart = list(span_passes(sequences, spans, max_tokens=5))
    assert [part.targets.tolist() for part in apart] == [[6, 9], [], [5, 6]]


def test_groups_are_not_torn_apart():
    parts = list(passes([[1] * 4, [1] * 3, [1] * 2, [1] * 2], [1] * 4, max_tokens=7, group=2))
    assert [part.samples for part in parts] == [[0, 1], [2, 3]]


def test_nothing_to_do_is_no_pass():
    assert list(passes([], [], max_tokens=8)) == []
