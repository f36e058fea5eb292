"""Losses at the points where their value is known, and against the formula elsewhere."""

import pytest
import torch

from hybrid_engine.config import PPOConfig
from hybrid_engine.rl.losses import entropy_loss, policy_loss, ptx_loss, value_loss
from hybrid_engine.rl.padding import length_mask

LENGTHS = torch.tensor([5, 1, 0, 3])
MASK = length_mask(LENGTHS, 5)


def draw(seed: int, *scales: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 5, generator=generator) * scale for scale in scales]


@pytest.mark.parametrize("dual_clip", [0.0, 3.0])
def test_at_ratio_one_the_loss_is_minus_the_advantages(dual_clip):
    logprobs, advantages = draw(0, 1.0, 2.0)
    logprobs.requires_grad_()
    loss, stats = policy_loss(
        logprobs, logprobs.detach().clone(), advantages, MASK, PPOConfig(dual_clip=dual_clip)
    )
    loss.backward()
    # Sums of 9 floats in float64: only the rounding of a float32 result is left.
    assert loss.item() == pytest.approx(-float(advantages[MASK].double().sum()), rel=1e-6)
    assert torch.equal(logprobs.grad, -advantages * MASK)
    assert stats.ratio == stats.count == 9
    assert stats.ratio_max == 1.0
    assert stats.kl_k3 == stats.kl_k2 == stats.clipped_low == stats.clipped_high == 0


@pytest.mark.parametrize("dual_clip", [0.0, 1.5])
def test_policy_loss_is_the_formula(dual_clip):
    new, old, advantages = draw(1, 0.5, 0.5, 1.0)
    config = PPOConfig(clip_low=0.1, clip_high=0.3, dual_clip=dual_clip)
    exact_new = new.double().requires_grad_()
    ratio = (exact_new - old.double()).exp()
    a = advantages.double()
    per_token = torch.maximum(-a * ratio, -a * ratio.clamp(0.9, 1.3))
    if dual_clip:
        per_token = torch.where(a < 0, torch.minimum(per_token, -a * dual_clip), per_token)
    exact = (per_token * MASK).sum()
    exact.backward()
    new.requires_grad_()
    loss, _ = policy_loss(new, old, advantages, MASK, config)
    loss.backward()
    torch.testing.assert_close(loss.item(), exact.item(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(new.grad, exact_new.grad.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value_clip", [0.2, 0.0])
def test_value_loss_is_the_formula(value_clip):
    values, old, returns = draw(2, 1.0, 1.0, 1.0)
    exact_values = values.double().requires_grad_()
    plain = (exact_values - returns.double()) ** 2
    worst = plain
    if value_clip:
        near = exact_values.clamp(old.double() - value_clip, old.double() + value_clip)
        worst = torch.maximum(plain, (near - returns.double()) ** 2)
    exact = 0.5 * (worst * MASK).sum()
    exact.backward()
    values.requires_grad_()
    loss, _ = value_loss(values, old, returns, MASK, PPOConfig(value_clip=value_clip))
    loss.backward()
    torch.testing.assert_close(loss.item(), exact.item(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values.grad, exact_values.grad.float(), rtol=1e-5, atol=1e-6)


def test_sums_over_micro_batches_equal_the_sum_over_the_batch():
    new, old, advantages = draw(3, 0.3, 0.3, 1.0)
    whole, stats = policy_loss(new, old, advantages, MASK, PPOConfig())
    parts = [
        policy_loss(
            new[i : i + 1], old[i : i + 1], advantages[i : i + 1], MASK[i : i + 1], PPOConfig()
        )
        for i in range(4)
    ]
    assert whole.item() == pytest.approx(sum(loss.item() for loss, _ in parts), rel=1e-6)
    assert stats.count == sum(part.count for _, part in parts)


def test_entropy_bonus_pushes_up_and_ignores_padding():
    entropies = torch.full((4, 5), torch.nan).masked_fill(MASK, 2.0).requires_grad_()
    loss, total = entropy_loss(entropies, MASK, coef=0.5)
    loss.backward()
    assert loss.item() == -9.0
    assert total == 18.0
    assert torch.equal(entropies.grad, -0.5 * MASK)
    free, _ = entropy_loss(entropies, MASK, coef=0.0)
    assert free.item() == 0.0
    assert not free.requires_grad


def test_ptx_is_a_weighted_negative_log_likelihood():
    logprobs = torch.tensor([-1.0, -3.0], requires_grad=True)
    loss = ptx_loss(logprobs, coef=0.25)
    loss.backward()
    assert float(loss.detach()) == 1.0
    assert logprobs.grad.tolist() == [-0.25, -0.25]
