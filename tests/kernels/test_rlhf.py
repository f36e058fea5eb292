"""RLHF statistics against hand-computed tables and formulas written out token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hybrid_kernels.ops.rlhf import (
    combine_moments,
    gae,
    masked_moments,
    masked_whiten,
    ppo_policy_loss,
    ppo_value_loss,
)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _mask(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(9)) < 0.7


# Advantages


def test_gae_of_a_table() -> None:
    """gamma 0.5, lambda 0.5, so that each step is worth a quarter of the next."""
    rewards = torch.tensor([[1.0, 0.0, 2.0, 99.0], [4.0, 99.0, 99.0, 99.0], [99.0] * 4])
    values = torch.tensor([[0.5, 1.0, -1.0, 99.0], [1.0, 99.0, 99.0, 99.0], [99.0] * 4])
    advantages, returns = gae(rewards, values, torch.tensor([3, 1, 0]), 0.5, 0.5)
    # deltas of row 0: 1 + .5 * 1 - .5 = 1;  0 - .5 - 1 = -1.5;  2 + 1 = 3
    assert advantages.tolist() == [[0.8125, -0.75, 3.0, 0.0], [3.0, 0, 0, 0], [0.0] * 4]
    assert returns.tolist() == [[1.3125, 0.25, 2.0, 0.0], [4.0, 0, 0, 0], [0.0] * 4]


def test_gae_is_the_discounted_sum_of_deltas() -> None:
    rewards, values = _random(4, 30, seed=1), _random(4, 30, seed=2)
    lengths, gamma, lam = [30, 17, 1, 0], 0.97, 0.9
    advantages, _ = gae(rewards, values, torch.tensor(lengths), gamma, lam)
    for b, length in enumerate(lengths):
        v = [*values[b, :length].tolist(), 0.0]
        deltas = [rewards[b, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
            assert advantages[b, t].item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert advantages[1, 17:].eq(0).all()


def test_lambda_one_returns_are_the_rewards_to_go() -> None:
    rewards, values = _random(3, 12, seed=1), _random(3, 12, seed=2)
    _, returns = gae(rewards, values, torch.full((3,), 12), 1.0, 1.0)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1))


# Whitening


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_is_the_formula_of_trl(shift_mean: bool) -> None:
    """masked_mean, masked_var with Bessel's factor, rsqrt(var + 1e-8), the mean added back."""
    x, mask = 3 * _random(5, 40) + 7, _mask(5, 40)
    white = masked_whiten(x, mask, shift_mean=shift_mean)
    kept = [v for v, m in zip(x.flatten().tolist(), mask.flatten().tolist(), strict=True) if m]
    mean = sum(kept) / len(kept)
    variance = sum((v - mean) ** 2 for v in kept) / len(kept)
    variance *= len(kept) / (len(kept) - 1)
    expected = [(v - mean) / math.sqrt(variance + 1e-8) + (0 if shift_mean else mean) for v in kept]
    torch.testing.assert_close(white[mask], torch.tensor(expected))
    assert white[~mask].eq(0).all()


def test_moments_of_ranks_combine() -> None:
    """Whitening with the union's moments does not depend on how the tokens lie on the ranks."""
    x, mask = 100 + _random(7, 50), _mask(7, 50)
    whole = masked_moments(x, mask)
    empty = masked_moments(x[:1], torch.zeros(1, 50, dtype=torch.bool))
    assert empty.tolist() == [0.0, 0.0, 0.0]
    parts = [masked_moments(x[a:b], mask[a:b]) for a, b in [(0, 1), (1, 4), (4, 7)]]
    joint = combine_moments(torch.stack([*parts, empty]))
    torch.testing.assert_close(joint, whole, rtol=1e-12, atol=0)
    assert combine_moments(empty[None]).tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(masked_whiten(x[:1], mask[:1], joint), masked_whiten(x, mask)[:1])


def test_moments_do_not_cancel() -> None:
    """Values near 1e6 that differ by units: a sum of squares in float32 would lose the variance."""
    x = 1e6 + torch.arange(8, dtype=torch.float32).repeat(2000).view(4, -1)
    count, mean, squares = masked_moments(x, torch.ones_like(x, dtype=torch.bool)).tolist()
    assert (count, mean) == (16000, 1e6 + 3.5)
    assert squares / count == pytest.approx(5.25, rel=1e-12)


def test_constant_and_single_tokens_whiten_to_zero() -> None:
    mask = torch.tensor([[True, True, False]])
    assert masked_whiten(torch.full((1, 3), 4.0), mask).tolist() == [[0.0, 0.0, 0.0]]
    assert masked_whiten(torch.full((1, 1), 4.0), torch.tensor([[True]])).tolist() == [[0.0]]


# Losses


def test_policy_loss_of_a_table() -> None:
    """Each way of clipping once: (ratio, advantage) -> loss, gradient."""
    rows = [
        (1.0, 2.0, -2.0, -2.0),  # inside
        (1.5, 2.0, -2.56, 0.0),  # above, A > 0: clipped at 1.28
        (0.5, 2.0, -1.0, -1.0),  # below, A > 0: the plain loss is greater
        (1.5, -2.0, 3.0, 3.0),  # above, A < 0: the plain loss is greater
        (0.5, -2.0, 1.6, 0.0),  # below, A < 0: clipped at 0.8
        (5.0, -2.0, 6.0, 0.0),  # far above, A < 0: dual clip at 3
    ]
    ratio, advantage, loss, grad = (torch.tensor([column]) for column in zip(*rows, strict=True))
    logprob = ratio.log().requires_grad_()
    everything = torch.ones_like(ratio, dtype=torch.bool)
    total, stats = ppo_policy_loss(
        logprob, torch.zeros_like(ratio), advantage, everything, 0.2, 0.28, dual_clip=3.0
    )
    assert total.dtype is torch.float64
    assert total.item() == pytest.approx(loss.double().sum().item(), rel=1e-6)
    total.backward()
    torch.testing.assert_close(logprob.grad, grad)
    assert (stats.count, stats.clipped_low, stats.clipped_high) == (6, 1, 1)
    logs = [math.log(r) for r, *_ in rows]
    assert stats.kl_k2 == pytest.approx(sum(0.5 * d * d for d in logs), rel=1e-6)
    assert stats.kl_k3 == pytest.approx(sum(math.exp(d) - 1 - d for d in logs), rel=1e-6)
    assert stats.ratio == pytest.approx(10.0, rel=1e-6)
    assert stats.ratio_max == pytest.approx(5.0, rel=1e-6)


def test_losses_are_the_formulas_of_trl() -> None:
    """TRL's PPOTrainer: masked means of its two losses, and its statistics."""
    mask, new, advantage = _mask(6, 33), _random(6, 33, seed=1), _random(6, 33, seed=2)
    old = new + 0.3 * _random(6, 33, seed=3)
    loss, stats = ppo_policy_loss(new, old, advantage, mask, 0.2, 0.2)
    difference = new.double() - old.double()
    ratio = difference.exp()
    losses = -advantage * ratio
    losses2 = -advantage * torch.clamp(ratio, 0.8, 1.2)
    count = mask.sum().item()
    assert loss.item() / count == pytest.approx(torch.max(losses, losses2)[mask].mean().item())
    clipped = stats.clipped_low + stats.clipped_high
    assert clipped / count == (losses2 > losses)[mask].double().mean().item()
    assert stats.kl_k2 / count == pytest.approx(0.5 * (difference**2)[mask].mean().item())

    value, target = _random(6, 33, seed=4), _random(6, 33, seed=5)
    old_value = value + 0.3 * _random(6, 33, seed=6)
    loss, stats = ppo_value_loss(value, old_value, target, mask, 0.2)
    v, o, r = value.double(), old_value.double(), target.double()
    losses = (v - r) ** 2
    losses2 = (torch.clamp(v, o - 0.2, o + 0.2) - r) ** 2
    assert loss.item() / count == pytest.approx(
        0.5 * torch.max(losses, losses2)[mask].mean().item()
    )
    assert stats.clipped / count == (losses2 > losses)[mask].double().mean().item()
    explained = 1 - (r - v)[mask].var() / r[mask].var()
    assert stats.explained_variance() == pytest.approx(explained.item())


def test_value_loss_of_a_table() -> None:
    """Old value 0, clip 0.2, return 1: beyond the near side clips, beyond the far side does not."""
    values = torch.tensor([[0.1, 0.5, -0.5]], requires_grad=True)
    zeros, ones = torch.zeros(1, 3), torch.ones(1, 3)
    loss, stats = ppo_value_loss(values, zeros, ones, ones.bool(), 0.2)
    assert loss.item() == pytest.approx(0.5 * (0.81 + 0.64 + 2.25), rel=1e-6)
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[-0.9, 0.0, -1.5]]))
    assert stats.clipped == 1
    plain, stats = ppo_value_loss(values, zeros, ones, ones.bool(), math.inf)
    assert plain.item() == pytest.approx(0.5 * (0.81 + 0.25 + 2.25), rel=1e-6)
    assert stats.clipped == 0


def test_an_unchanged_policy_has_ratio_exactly_one() -> None:
    logprob, advantage = _random(4, 20) * 30, _random(4, 20, seed=1)
    loss, stats = ppo_policy_loss(logprob, logprob.clone(), advantage, _mask(4, 20), 0.2, 0.2)
    assert (stats.ratio, stats.ratio_max) == (stats.count, 1.0)
    assert (stats.kl_k2, stats.kl_k3, stats.clipped_low, stats.clipped_high) == (0, 0, 0, 0)
    assert loss.item() == pytest.approx(-advantage.double()[_mask(4, 20)].sum().item())


def test_what_the_mask_hides_does_not_matter() -> None:
    mask = _mask(3, 50)
    hidden = [_random(3, 50, seed=s).masked_fill(~mask, torch.nan) for s in range(4)]
    hidden[0].requires_grad_()
    policy, _ = ppo_policy_loss(*hidden[:3], mask, 0.2, 0.2)
    value, _ = ppo_value_loss(hidden[0], *hidden[1:3], mask, 0.2)
    (policy + value).backward()
    assert (policy + value).isfinite()
    assert hidden[0].grad[~mask].eq(0).all()
    assert hidden[0].grad.isfinite().all()
    assert masked_whiten(hidden[3], mask).isfinite().all()


def test_an_empty_mask_gives_zero() -> None:
    x, nothing = _random(2, 5), torch.zeros(2, 5, dtype=torch.bool)
    policy, stats = ppo_policy_loss(
        x.requires_grad_(), x.detach() + 1, x.detach(), nothing, 0.2, 0.2
    )
    policy.backward()
    assert (policy.item(), stats.count, stats.ratio_max) == (0, 0, 0)
    assert x.grad.eq(0).all()
    _, stats = ppo_value_loss(x.detach(), x.detach(), x.detach(), nothing, 0.2)
    assert math.isnan(stats.explained_variance())


def test_micro_batches_add_up() -> None:
    """Loss, gradient and statistics of a batch are the sums of its parts: gradient accumulation."""
    mask = _mask(8, 4100)
    new, advantage = _random(8, 4100, seed=1), _random(8, 4100, seed=2)
    old = new + 0.2 * _random(8, 4100, seed=3)

    def run(rows: slice, scale: float):
        leaf = new[rows].clone().requires_grad_()
        loss, stats = ppo_policy_loss(leaf, old[rows], advantage[rows], mask[rows], 0.2, 0.2)
        (loss / scale).backward()
        return loss, stats, leaf.grad

    count = mask.sum().item()
    whole_loss, whole_stats, whole_grad = run(slice(0, 8), count)
    parts = [run(slice(start, start + 2), count) for start in range(0, 8, 2)]
    torch.testing.assert_close(sum(p[0] for p in parts), whole_loss, rtol=1e-12, atol=0)
    assert torch.equal(torch.cat([p[2] for p in parts]), whole_grad)
    joined = parts[0][1] + parts[1][1] + parts[2][1] + parts[3][1]
    for name, value in vars(whole_stats).items():
        assert getattr(joined, name) == pytest.approx(value, rel=1e-12)


def test_a_far_policy_stays_finite() -> None:
    """Log ratios beyond +-20 are cut: a finite loss, and no gradient where it is constant."""
    new = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    old, advantage = torch.zeros(1, 3), torch.tensor([[-1.0, 1.0, 1.0]])
    loss, stats = ppo_policy_loss(new, old, advantage, torch.ones(1, 3).bool(), 0.2, 0.2)
    loss.backward()
    assert stats.ratio_max == pytest.approx(math.exp(20))
    assert new.grad.tolist() == [[0.0, 0.0, -1.0]]
