"""Averages over unequal parts, and explained variance."""

import math

import pytest
import torch

from hybrid_engine.rl.largest import largest
from hybrid_engine.rl.metrics import (
    Averages,
    add_policy_stats,
    add_value_stats,
    explained_variance,
    response_statistics,
)
from hybrid_engine.rl.moments import moments_of
from hybrid_kernels.ops.rlhf import PolicyStats, ValueStats


def alone(own):
    return [own]


def test_averages_weigh_tokens_not_parts():
    averages = Averages()
    averages.add("loss", total=10.0, weight=1)
    averages.add("loss", total=torch.tensor(2.0), weight=3)
    averages.add("nothing", total=0.0, weight=0)
    assert averages.result(alone) == {"loss": 3.0}


def test_averages_over_ranks_with_different_names():
    first, second = Averages(), Averages()
    first.add_all({"a": 6.0, "b": 0.0}, weight=2)
    first.add_max("peak", 1.0)
    second.add("a", 1.0, weight=5)
    second.add("other", 4.0, weight=2)
    second.add_max("peak", 3.0)
    sent = []
    second.result(lambda own: sent.append(own) or [own])
    assert first.result(lambda own: [own, *sent]) == {"a": 1.0, "b": 0.0, "other": 2.0, "peak": 3.0}


@pytest.mark.parametrize("order", [(math.nan, 1.0), (1.0, math.nan)])
def test_a_maximum_does_not_hide_nan(order):
    """max(1.0, nan) is 1.0 in Python."""
    averages = Averages()
    for value in order:
        averages.add_max("peak", value)
    assert math.isnan(averages.result(alone)["peak"])
    first, second = Averages(), Averages()
    first.add_max("peak", order[0])
    second.add_max("peak", order[1])
    sent = []
    second.result(lambda own: sent.append(own) or [own])
    assert math.isnan(first.result(lambda own: [own, *sent])["peak"])


def test_the_largest_of_none_is_the_default():
    assert largest([], default=0.0) == 0.0
    assert largest([2, 3.5]) == 3.5


def test_loss_statistics_get_names():
    averages = Averages()
    add_policy_stats(averages, PolicyStats(2.0, 1.0, 0.0, 0.5, 0.25, 2.5, 1.5))
    add_policy_stats(averages, PolicyStats(2.0, 0.0, 1.0, 0.5, 0.25, 1.5, 0.9))
    add_value_stats(averages, ValueStats(4.0, 1.0, 0.0, 8.0, 0.0, 0.0))
    assert averages.result(alone) == {
        "ratio": 1.0,
        "approx_kl": 0.125,
        "approx_kl_k2": 0.25,
        "clip_fraction_low": 0.25,
        "clip_fraction_high": 0.25,
        "ratio_max": 1.5,
        "value_error": 2.0,
        "value_clip_fraction": 0.25,
    }


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0])
    perfect = moments_of(torch.zeros(4))
    assert explained_variance(perfect, moments_of(returns)) == 1.0
    constant = moments_of(returns - 2.5)
    assert explained_variance(constant, moments_of(returns)) == pytest.approx(0.0)
    off_by_a_constant = moments_of(torch.full((4,), 7.0))
    assert explained_variance(off_by_a_constant, moments_of(returns)) == 1.0
    assert explained_variance(moments_of(-2 * returns), moments_of(returns)) == pytest.approx(-3.0)
    assert math.isnan(explained_variance(perfect, moments_of(torch.ones(4))))


def test_response_statistics():
    averages = Averages()
    for name, (total, weight) in response_statistics(
        torch.tensor([4, 8]), torch.tensor([True, False])
    ).items():
        averages.add(name, total, weight)
    assert averages.result(alone) == {"response_length": 6.0, "eos_rate": 0.5}
