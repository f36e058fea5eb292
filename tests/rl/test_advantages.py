"""GAE by hand and by definition, and whitening over several ranks' shares."""

import pytest
import torch

from hybrid_engine.rl.advantages import gae, whiten
from hybrid_engine.rl.moments import combine_moments, moments_of
from hybrid_engine.rl.padding import length_mask


def test_gae_by_hand():
    """gamma 1, lambda 0.5; rewards 0, 0, 1 and values 0.5, 0.5, 0.5.

    delta = 0, 0, 0.5;  A_2 = 0.5, A_1 = 0.25, A_0 = 0.125. The second row ends after one token.
    """
    rewards = torch.tensor([[0.0, 0.0, 1.0], [2.0, 9.0, 9.0]])
    values = torch.tensor([[0.5, 0.5, 0.5], [0.5, 9.0, 9.0]])
    advantages, returns = gae(rewards, values, torch.tensor([3, 1]), gamma=1.0, lam=0.5)
    assert advantages.tolist() == [[0.125, 0.25, 0.5], [1.5, 0.0, 0.0]]
    assert returns.tolist() == [[0.625, 0.75, 1.0], [2.0, 0.0, 0.0]]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_one_is_the_discounted_return(gamma):
    rewards, values = torch.randn(2, 3, 11)
    lengths = torch.tensor([11, 4, 1])
    _, returns = gae(rewards, values, lengths, gamma, lam=1.0)
    for row, n in enumerate(lengths.tolist()):
        for t in range(n):
            exact = sum(gamma ** (s - t) * float(rewards[row, s]) for s in range(t, n))
            assert float(returns[row, t]) == pytest.approx(exact, abs=1e-5)


def test_lambda_zero_is_the_one_step_error():
    rewards, values = torch.randn(2, 1, 5)
    advantages, _ = gae(rewards, values, torch.tensor([5]), gamma=0.9, lam=0.0)
    following = torch.cat([values[0, 1:], torch.zeros(1)])
    torch.testing.assert_close(advantages[0], rewards[0] + 0.9 * following - values[0])


def test_whitening_uses_the_moments_of_all_ranks():
    x = torch.randn(4, 6) * 3 + 2
    lengths = torch.tensor([6, 2, 0, 5])
    mask = length_mask(lengths, 6)
    kept = x[mask].double()
    expected = (x.double() - kept.mean()) / (kept.var() + 1e-8).sqrt() * mask
    for rows in (slice(0, 1), slice(1, 4)):  # two ranks of unequal size

        def reduce(own, others=slice(1, 4) if rows.start == 0 else slice(0, 1)):
            return combine_moments(torch.stack([own, moments_of(x[others][mask[others]])]))

        share = whiten(x[rows], mask[rows], reduce)
        torch.testing.assert_close(share, expected[rows].float(), rtol=1e-5, atol=1e-6)


def test_whitening_alone_and_without_shifting():
    x, mask = torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]])
    deviation = 2**0.5
    white = whiten(x, mask, lambda own: own)
    torch.testing.assert_close(white, torch.tensor([[-1.0, 1.0, 0.0]]) / deviation)
    kept = whiten(x, mask, lambda own: own, shift_mean=False)
    torch.testing.assert_close(kept, torch.tensor([[2 - 1 / deviation, 2 + 1 / deviation, 0.0]]))


def test_a_rank_without_tokens_takes_part():
    whole = moments_of(torch.randn(8))
    nothing = whiten(
        torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.bool), lambda own: own + whole
    )
    assert nothing.shape == (0, 0)
