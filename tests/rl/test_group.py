"""Group-relative advantages against tables worked out by hand, and their edge cases."""

import pytest
import torch

from hybrid_engine.rl.advantages import per_token
from hybrid_engine.rl.group import (
    ESTIMATORS,
    dr_grpo,
    grpo,
    reinforce_baseline,
    rloo,
    zero_std_groups,
)

SCORES = torch.tensor([1.0, 2.0, 3.0, 10.0, 10.0, 10.0])


def test_grpo():
    """First group: mean 2, sample std 1. Second: all equal."""
    expected = torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(grpo(SCORES, 3), expected, rtol=2e-6, atol=0)


def test_dr_grpo_and_reinforce_baseline_do_not_divide():
    scores = torch.tensor([0.0, 8.0])
    assert dr_grpo(scores, 2).tolist() == reinforce_baseline(scores, 2).tolist() == [-4.0, 4.0]


def test_rloo():
    """1 - (2 + 3) / 2 = -1.5 and so on; G / (G - 1) times the group-centred score."""
    advantages = rloo(SCORES, 3)
    assert advantages.tolist() == [-1.5, 0.0, 1.5, 0.0, 0.0, 0.0]
    torch.testing.assert_close(advantages, dr_grpo(SCORES, 3) * 3 / 2)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_groups_do_not_mix_and_sum_to_zero(name):
    scores = torch.randn(12, generator=torch.Generator().manual_seed(1))
    together = ESTIMATORS[name](scores, 4)
    apart = torch.cat([ESTIMATORS[name](part, 4) for part in scores.split(4)])
    assert torch.equal(together, apart)
    torch.testing.assert_close(together.reshape(3, 4).sum(1), torch.zeros(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_group_of_one_keeps_its_score(name):
    scores = torch.tensor([3.0, -1.0])
    assert torch.equal(ESTIMATORS[name](scores, 1), scores)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("score", [0.1, 5.3, -1234.5])
def test_equal_scores_teach_nothing(name, score):
    """Not binary fractions: a mean off by one ulp over a tiny std must not look like a signal."""
    advantages = ESTIMATORS[name](torch.full((7,), score), 7)
    assert advantages.abs().max() <= 1e-6 * max(1, abs(score))


def test_zero_std_groups_are_counted():
    assert zero_std_groups(SCORES, 3) == (1, 2)
    assert zero_std_groups(torch.empty(0), 3) == (0, 0)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_incomplete_groups_are_refused(name):
    with pytest.raises(ValueError, match="do not divide into groups of 4"):
        ESTIMATORS[name](SCORES, 4)


def test_per_token_stops_at_the_length():
    spread = per_token(torch.tensor([2.0, -1.0]), torch.tensor([1, 3]), width=3)
    assert spread.tolist() == [[2.0, 0.0, 0.0], [-1.0, -1.0, -1.0]]
