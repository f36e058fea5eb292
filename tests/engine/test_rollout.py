"""Rollout's views of its lists, and the parameters that are refused."""

from __future__ import annotations

import math

import pytest

from hybrid_engine.engine import Rollout, SamplingParams
from hybrid_engine.errors import UserError


@pytest.fixture
def rollout() -> Rollout:
    return Rollout(
        prompts=[[1, 2], [3]],
        tokens=[[10, 11, 12], [13], [14, 15], [16]],
        logprobs=[[-1.0, -2.0, -3.0], [-4.0], [-5.0, -6.0], [-7.0]],
        entropies=[[0.1, 0.2, 0.3], [0.4], [0.5, 0.6], [0.7]],
        finish_reasons=["length", "stop", "stop", "stop"],
        kept_mass=[[1.0] * 3, [1.0], [0.5] * 2, [1.0]],
        thresholds=[[-math.inf] * 3, [-math.inf], [0.25, -8.0], [-math.inf]],
        kept_logprobs=[[-1.0, -2.0, -3.0], [-4.0], [-4.5, -5.5], [-7.0]],
        n=2,
    )


def test_views(rollout: Rollout) -> None:
    assert len(rollout) == 4
    assert rollout.lengths.tolist() == [3, 1, 2, 1]
    assert rollout.prompt_lengths == [2, 2, 1, 1]
    assert rollout.sequences == [[1, 2, 10, 11, 12], [1, 2, 13], [3, 14, 15], [3, 16]]


def test_padded_tensors(rollout: Rollout) -> None:
    assert rollout.mask().int().tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]]
    assert rollout.padded_logprobs().tolist() == [[-1, -2, -3], [-4, 0, 0], [-5, -6, 0], [-7, 0, 0]]
    kept = rollout.padded_kept_logprobs()
    assert kept.tolist() == [[-1, -2, -3], [-4, 0, 0], [-4.5, -5.5, 0], [-7, 0, 0]]
    assert rollout.padded_thresholds()[2].tolist() == [0.25, -8.0, 0.0]


def test_an_empty_rollout_has_empty_tensors() -> None:
    empty = Rollout([], [], [], [], [], [], [], [])
    assert empty.padded_logprobs().shape == (0, 0)
    assert empty.lengths.shape == (0,)


def test_columns_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="Rollout.logprobs has 1 entries; expected 2"):
        Rollout([[1]], [[2], [3]], *([[[0.0]]] * 2), ["stop"], *([[[1.0]]] * 3), n=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0), ("max_new_tokens", 0), ("temperature", -0.1), ("temperature", math.nan),
        ("temperature", math.inf), ("temperature", 1e-7), ("top_k", -1), ("top_p", 0.0),
        ("top_p", 1.1), ("seed", -1), ("seed", 2**63), ("stop_token_ids", [3, -2]),
    ],
)  # fmt: skip
def test_sampling_parameters_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"SamplingParams.{name} is .*; it must be"):
        SamplingParams(**{name: value})


def test_sampling_parameters_say_what_they_mean() -> None:
    greedy = SamplingParams(temperature=0.0, stop_token_ids=[4, 5])
    assert greedy.greedy
    assert greedy.scoring_temperature == 1.0
    assert greedy.stop_token_ids == (4, 5)
    assert not SamplingParams().truncated
    assert SamplingParams(top_k=3).truncated
    assert SamplingParams(top_p=0.9).truncated
    assert SamplingParams(temperature=0.5).scoring_temperature == 0.5
