"""Score shaping: each rule by hand, their order, and where the score lands."""

import pytest
import torch

from hybrid_engine.config import RewardShapingConfig
from hybrid_engine.errors import UserError
from hybrid_engine.rl.moments import RunningMoments, moments_of
from hybrid_engine.rl.rewards import shape_scores, token_rewards

DONE = torch.tensor([True, True, True])


def shape(scores, config, finished=DONE, lengths=(1, 1, 1), limit=10, moments=None):
    return shape_scores(
        torch.tensor(scores),
        finished,
        torch.tensor(lengths),
        limit,
        config,
        moments or RunningMoments(),
    )


def test_plain_scores_pass_through():
    shaped = shape([1.0, -2.0, 3.0], RewardShapingConfig(clip=0.0))
    assert shaped.scores.tolist() == [1.0, -2.0, 3.0]
    assert (shaped.missing_eos, shaped.overlong, shaped.clipped) == (0, 0, 0)


def test_missing_eos_is_subtracted():
    shaped = shape(
        [1.0, 1.0, 1.0],
        RewardShapingConfig(missing_eos_penalty=2.0),
        torch.tensor([True, False, True]),
    )
    assert shaped.scores.tolist() == [1.0, -1.0, 1.0]
    assert shaped.missing_eos == 1


def test_overlong_penalty_grows_over_the_buffer():
    """Limit 10, buffer 4: nothing up to 6 tokens, half at 8, all of the factor at 10."""
    config = RewardShapingConfig(overlong_buffer=4, overlong_factor=2.0)
    shaped = shape([0.0, 0.0, 0.0], config, lengths=(6, 8, 10))
    assert shaped.scores.tolist() == [0.0, -1.0, -2.0]
    assert shaped.overlong == 2


@pytest.mark.parametrize("how", ["scale", "standardize"])
def test_normalisation_by_running_moments(how):
    scores = [1.0, 2.0, 6.0]
    moments = RunningMoments()
    moments.update(moments_of(torch.tensor(scores)))
    shaped = shape(scores, RewardShapingConfig(normalize=how), moments=moments)
    std = torch.tensor(scores).std()
    mean = 3.0 if how == "standardize" else 0.0
    torch.testing.assert_close(shaped.scores, (torch.tensor(scores) - mean) / std)


@pytest.mark.parametrize("how, wanted", [("scale", 0.3), ("standardize", 0.0)])
def test_equal_scores_do_not_explode(how, wanted):
    """A standard deviation of rounding noise, 3e-9 here, is nothing to divide by."""
    moments = RunningMoments()
    moments.update(moments_of(torch.tensor([0.3, 0.3, 0.3 + 3e-8])))
    shaped = shape([0.3, 0.3, 0.3], RewardShapingConfig(normalize=how), moments=moments)
    torch.testing.assert_close(shaped.scores, torch.full((3,), wanted), rtol=0, atol=1e-6)
    assert shaped.clipped == 0


def test_order_normalise_penalty_clip():
    """Score 100 at sigma 10 is 10; minus 3 is 7; clipped to 5. Any other order gives another
    number."""
    moments = RunningMoments()
    moments.update(torch.tensor([101.0, 0.0, 100.0 * 100.0], dtype=torch.float64))
    config = RewardShapingConfig(normalize="scale", missing_eos_penalty=3.0, clip=5.0)
    shaped = shape(
        [100.0, 60.0, -100.0], config, torch.tensor([False, False, True]), moments=moments
    )
    torch.testing.assert_close(shaped.scores, torch.tensor([5.0, 3.0, -5.0]))
    assert shaped.clipped == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_refused(bad):
    with pytest.raises(UserError, match=r"for sample 1 of 3 \(1 such samples\)"):
        shape([0.0, bad, 0.0], RewardShapingConfig())


def test_score_lands_on_the_last_token():
    kl = torch.tensor([[0.5, 1.0, 9.0], [1.0, 2.0, 3.0], [9.0, 9.0, 9.0]])
    lengths = torch.tensor([2, 3, 0])
    rewards = token_rewards(torch.tensor([10.0, 20.0, 30.0]), kl, lengths, kl_coef=0.1)
    expected = torch.tensor([[-0.05, 9.9, 0.0], [-0.1, -0.2, 19.7], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def test_junk_past_the_length_is_ignored():
    kl = torch.full((1, 3), torch.nan)
    kl[0, 0] = 1.0
    rewards = token_rewards(torch.tensor([2.0]), kl, torch.tensor([1]), kl_coef=1.0)
    assert rewards.tolist() == [[1.0, 0.0, 0.0]]
