"""Membership of rows: disjoint, in proportion, and untouched by what happens around them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_engine.config import DataConfig
from hybrid_engine.data import load_stage
from hybrid_engine.data.records import Kind
from hybrid_engine.data.schema import PROMPT, TEXT
from hybrid_engine.data.split import (
    blend_counts,
    content_key,
    keys_array,
    split_heldout,
    step_rows,
)
from tests.data.files import write_jsonl
from tests.tiny import make_tiny_tokenizer

ANY = Kind("any", ("text",))
STEPS = ("sft", "reward", "rlhf")


def keys(count, seed=0):
    return keys_array([content_key({"text": f"row {i}"}, TEXT, seed) for i in range(count)])


def texts(data):
    """The texts of step 3's examples."""
    return [example.text for example in data]


def load(path, stage="rlhf", seed=0, **config):
    config = {"max_rows": 0, "split": (1, 0, 1), **config}
    paths = (path,) if isinstance(path, str) else path
    return load_stage(DataConfig(path=paths, **config), stage, make_tiny_tokenizer(), seed, 257)


def prompts(count, name="prompt"):
    return [{"prompt": f"{name} {i}"} for i in range(count)]


def test_steps_are_disjoint_complete_and_in_proportion():
    rows = [step_rows(keys(20_000), ANY, (2.0, 4.0, 4.0), step) for step in STEPS]
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(20_000))
    # A share p of n rows has standard deviation sqrt(n p (1-p)); 5 of them is never seen by chance.
    for found, share in zip(rows, (0.2, 0.4, 0.4), strict=True):
        assert abs(len(found) - 20_000 * share) < 5 * np.sqrt(20_000 * share * (1 - share))


def test_a_kind_is_shared_among_the_steps_it_can_serve():
    assert len(step_rows(keys(1000), PROMPT, (2, 4, 4), "rlhf")) == 1000
    assert len(step_rows(keys(1000), PROMPT, (2, 4, 4), "sft")) == 0
    assert len(step_rows(keys(1000), PROMPT, (1, 1, 0), "rlhf")) == 0


@given(st.lists(st.floats(0, 10), min_size=3, max_size=3).filter(sum), st.integers(0, 2**32))
def test_any_shares_place_every_row_exactly_once(shares, seed):
    rows = [step_rows(keys(50, seed), ANY, tuple(shares), step) for step in STEPS]
    assert sorted(np.concatenate(rows)) == list(range(50))


def test_the_three_numbers_of_a_row_are_independent_and_uniform():
    values = keys(20_000)
    assert values.min() >= 0
    assert values.max() < 1
    assert np.abs(values.mean(axis=0) - 0.5).max() < 5 * np.sqrt(1 / 12 / 20_000)
    assert np.abs(np.corrcoef(values.T) - np.eye(3)).max() < 5 / np.sqrt(20_000)


@pytest.mark.parametrize("stage", ["sft", "rlhf"])
def test_a_growing_source_keeps_every_row_where_it_was(tmp_path, stage):
    rows = [{"text": f"row number {i}"} for i in range(300)]
    small = load(write_jsonl(tmp_path / "small.jsonl", rows[:150]), stage, prompt_words=2)
    # New rows in front, among and behind the old ones.
    grown = load(
        write_jsonl(tmp_path / "grown.jsonl", [*rows[150:250], *rows[:150], *rows[250:]]),
        stage,
        prompt_words=2,
    )
    for part in ("train", "heldout"):
        before = {str(example.tokens) for example in getattr(small, part)}
        after = {str(example.tokens) for example in getattr(grown, part)}
        assert before
        assert before <= after


def test_seed_changes_membership_and_nothing_else_does(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", prompts(200))
    first, again, other = load(path), load(path), load(path, seed=1)
    assert texts(first.train) == texts(again.train)
    assert texts(first.heldout) == texts(again.heldout)
    assert set(texts(first.heldout)) != set(texts(other.heldout))


def test_duplicates_and_corrected_labels_stay_on_one_side(tmp_path):
    rows = [{"text": f"review {i}", "label": label} for i in range(200) for label in (0, 1)]
    data = load(write_jsonl(tmp_path / "a.jsonl", rows), prompt_words=1, split=(0, 0, 1))
    train, heldout = (
        {example.extra["text"] for example in part} for part in (data.train, data.heldout)
    )
    assert train
    assert heldout
    assert not train & heldout
    assert len(data.train) == 2 * len(train)


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_a_small_source_has_rows_of_both_sorts_and_a_single_row_is_trained_on(fraction):
    assert split_heldout(keys(3), fraction).sum() == (1 if fraction < 0.5 else 2)
    assert split_heldout(keys(1), fraction).sum() == 0
    assert split_heldout(keys(0), fraction).shape == (0,)


def test_heldout_rows_beyond_the_maximum_are_not_trained_on(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", prompts(200))
    wide, narrow = (load(path, heldout_fraction=0.5, max_heldout=most) for most in (512, 7))
    assert len(narrow.heldout) == 7
    assert len(wide.heldout) > 50
    assert texts(narrow.train) == texts(wide.train)
    assert set(texts(narrow.heldout)) < set(texts(wide.heldout))


def test_max_rows_takes_a_sample_of_the_source(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", prompts(400))
    data = load(path, max_rows=40)
    chosen = {int(text.split()[1]) for text in texts(data.train) + texts(data.heldout)}
    assert len(chosen) == 40
    assert min(chosen) < 100
    assert max(chosen) >= 300


@pytest.mark.parametrize(
    ("available", "weights", "taken"),
    [
        ([100, 100], (1.0, 3.0), [33, 100]),
        ([100, 10], (1.0, 1.0), [10, 10]),
        ([100, 0], (1.0, 1.0), [100, 0]),
        ([0, 0], (1.0, 1.0), [0, 0]),
        ([7, 9], (), [7, 9]),
    ],
)
def test_blending_keeps_the_proportion_and_repeats_no_row(available, weights, taken):
    assert blend_counts(available, weights) == taken


def test_sources_are_blended_by_weight(tmp_path):
    paths = tuple(
        write_jsonl(tmp_path / f"{name}.jsonl", prompts(200, name)) for name in ("left", "right")
    )
    data = load(paths, weights=(1.0, 4.0))
    sides = [text.split()[0] for text in texts(data.train)]
    assert sides.count("right") == pytest.approx(4 * sides.count("left"), abs=2)
    assert len(set(texts(data.train))) == len(data.train)
