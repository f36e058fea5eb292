"""KL estimators against the exact divergence, and the controllers against their formula."""

import pytest
import torch

from hybrid_engine.config import KLConfig
from hybrid_engine.rl.kl import AdaptiveKL, FixedKL, k1, k3, make_kl_controller


def random_categoricals(seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 0.5 * torch.randn(2, size, generator=generator, dtype=torch.float64)
    return tuple(torch.log_softmax(logits, -1))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("size", [2, 7, 100])
def test_k1_and_k3_are_unbiased(seed, size):
    """E_pi[k] as an exact sum over the vocabulary, so only rounding remains (no clamp binds
    here)."""
    policy, reference = random_categoricals(seed, size)
    exact = (policy.exp() * (policy - reference)).sum()
    for estimator in (k1, k3):
        expected = (policy.exp() * estimator(policy, reference)).sum()
        torch.testing.assert_close(expected, exact, rtol=1e-12, atol=1e-12)


def test_the_other_sign_is_another_quantity():
    """exp(d) - 1 - d, logged by some trainers, is not KL(pi || ref): the test above can fail."""
    policy, reference = torch.tensor([[0.9, 0.1], [0.5, 0.5]], dtype=torch.float64).log()
    d = policy - reference
    exact = (policy.exp() * d).sum()
    wrong = (policy.exp() * (d.exp() - 1 - d)).sum()
    assert abs(wrong - exact) > 0.1 * exact


@pytest.mark.parametrize("gap", [-1e4, -30.0, 30.0, 1e4, torch.inf, -torch.inf])
def test_a_single_impossible_token_does_not_explode(gap):
    logprob, reference = torch.zeros(1), torch.full((1,), -gap)
    assert 0 <= k3(logprob, reference).item() <= 10


def test_k3_is_exact_near_zero():
    """d = 1e-4: d^2 / 2 = 5e-9 survives fp32 only because exp(-d) - 1 is expm1."""
    d = torch.tensor([1e-4])
    assert k3(d, torch.zeros(1)).item() == pytest.approx(5e-9, rel=1e-2)


def test_adaptive_controller_follows_ziegler():
    controller = AdaptiveKL(coef=0.1, target=6.0, horizon=1000)
    controller.update(kl_per_sequence=6.6, num_sequences=50)
    assert controller.coef == pytest.approx(0.1 * (1 + 0.1 * 50 / 1000))
    controller = AdaptiveKL(coef=0.1, target=6.0, horizon=1000)
    controller.update(kl_per_sequence=600.0, num_sequences=50)
    assert controller.coef == pytest.approx(0.1 * (1 + 0.2 * 50 / 1000))
    controller.update(kl_per_sequence=0.0, num_sequences=1000)
    assert controller.coef == pytest.approx(0.1 * (1 + 0.2 * 50 / 1000) * 0.8)


def test_controller_state_is_exact():
    first = AdaptiveKL(0.1, 6.0, 333)
    first.update(7.123, 17)
    second = AdaptiveKL(0.9, 6.0, 333)
    second.load_state_dict(first.state_dict())
    for controller in (first, second):
        controller.update(3.3, 17)
    assert first.coef == second.coef


def test_fixed_controller_stays():
    controller = make_kl_controller(KLConfig(coef=0.03, target=0.0))
    controller.update(1e9, 10)
    assert type(controller) is FixedKL
    assert controller.coef == 0.03
    assert isinstance(make_kl_controller(KLConfig(coef=0.03, target=6.0)), AdaptiveKL)
