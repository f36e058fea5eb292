"""Moments combine exactly, in any split and order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_engine.rl.moments import RunningMoments, combine_moments, moments_of, variance_of


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    offset=st.sampled_from([0.0, 3.0, 1e4]),
)
def test_any_split_gives_the_moments_of_the_whole(seed, cuts, offset):
    x = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset
    bounds = [0, *sorted(cuts), 40]
    parts = torch.stack([moments_of(x[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)])
    count, mean, _ = combine_moments(parts).tolist()
    assert count == 40
    assert mean == pytest.approx(float(x.mean()), rel=1e-12)
    # Squared deviations of order 1 around 1e4: 1e-16 * 1e8 of absolute error is the most that
    # rounding explains.
    assert variance_of(combine_moments(parts)) == pytest.approx(float(x.var()), rel=1e-7)


def test_empty_and_single():
    assert moments_of(torch.empty(0)).tolist() == [0, 0, 0]
    assert variance_of(moments_of(torch.tensor([3.0]))) == 0.0
    assert combine_moments(torch.zeros(3, 3)).tolist() == [0, 0, 0]


def test_running_moments_equal_those_of_all_batches():
    batches = [torch.randn(n) * 4 + 2 for n in (5, 1, 17)]
    running = RunningMoments()
    for batch in batches:
        running.update(moments_of(batch))
    everything = torch.cat(batches).double()
    assert running.count == 23
    assert running.mean == pytest.approx(float(everything.mean()), rel=1e-12)
    assert running.std == pytest.approx(float(everything.std()), rel=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e6])
def test_what_does_not_vary_is_divided_by_one(value):
    """Equal scores but for a rounding of fp32, which is no more than 1.2e-7 of them."""
    running = RunningMoments()
    assert running.std == 1.0
    running.update(moments_of(torch.full((7,), value)))
    running.update(moments_of(torch.tensor([value * (1 + 1e-7), value])))
    assert running.std == 1.0
    running.update(moments_of(torch.tensor([value * 1.5 + 1])))
    assert running.std > 0.1


def test_state_survives_json():
    import json

    first = RunningMoments()
    first.update(moments_of(torch.randn(9)))
    second = RunningMoments()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (second.count, second.mean, second.std) == (first.count, first.mean, first.std)
