"""Scoring and sampling beyond the common tests: exactness, distributions, kept sets, streams."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from hybrid_kernels.ops.head import linear_sample, linear_token_logprobs
from hybrid_kernels.ops.linear import linear
from hybrid_kernels.ops.sampling import Sample, sample, token_logprobs
from hybrid_kernels.reference import sampling as reference
from hybrid_kernels.testing import assert_same_bits


def _logits(rows: int, vocab: int, spread: float = 3.0, seed: int = 0) -> Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def _draw(logits: Tensor, temperature=1.0, top_k=0, top_p=1.0, seed=5, first_id=0) -> Sample:
    ids = torch.arange(first_id, first_id + len(logits))
    return sample(logits, temperature, top_k, top_p, seed, ids, torch.full_like(ids, 7))


# Scores


def _flat(level: float) -> Tensor:
    """One token at 20, all others at one level: every rounding goes the same way."""
    logits = torch.full((8, 49152), level)
    logits[:, 777] = 20.0
    return logits


LOGITS = {
    "equal": _logits(8, 50257, 0.0),
    "narrow": _logits(8, 50257, 1.0, seed=1),
    "wide": _logits(8, 50257, 4.0, seed=2),
    "uniform-20": 40 * torch.rand(8, 49152, generator=torch.Generator().manual_seed(3)) - 20,
    "peak-10": _flat(9.9),
    "peak-20": _flat(0.1),
    "outliers": _logits(8, 49152, 1.0, seed=4) + 20 * torch.eye(8, 49152),
}


@pytest.mark.parametrize("temperature", [0.25, 1.0, 1.7])
@pytest.mark.parametrize("kind", LOGITS)
def test_logprob_is_within_1e_6_of_float64(kind: str, temperature: float) -> None:
    """Half an ulp of the result, which is 1e-6 from -16 down and no error of the sum, and 5e-7.

    In float are 64 exponentials relative to their own maximum: each good to 2 ulp (1.2e-7), its
    argument d rounded twice (|d| 2^-23, where the weight is e^-|d|: at most 0.37 * 1.2e-7 of the
    block), and 6 additions of halves (at most 6 * 6e-8). What comes after, the blocks' own scales
    and the logarithm, is in float64.
    """
    logits = LOGITS[kind]
    targets = torch.cat([logits[:4].argmax(-1), logits[4:].argmin(-1)])
    logprob, entropy = token_logprobs(logits, targets, temperature)
    exact, exact_entropy = reference.token_logprobs(logits.double(), targets, temperature)
    half_ulp = exact.abs() * 2**-24
    assert ((logprob - exact).abs() <= half_ulp + 5e-7).all()
    assert ((logprob - exact).abs()[exact > -8] <= 1e-6).all()
    assert ((entropy - exact_entropy).abs() <= 1e-6).all()


VOCABULARIES = [1, 2, 63, 64, 65, 127, 129, 255, 257, 1023, 1025, 32003, 49151, 49152, 49153, 50257]


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_logprobs_from_a_head_are_within_1e_6_of_float64(vocab: int) -> None:
    """Blocks and tiles of the vocabulary that are full, one short or one over."""
    rng = torch.Generator().manual_seed(vocab)
    hidden, weight = torch.randn(7, 16, generator=rng), torch.randn(vocab, 16, generator=rng)
    targets = torch.randint(vocab, (7,), generator=rng)
    logits = linear(hidden, weight).double()
    for temperature in (0.7, 1.0):
        scores = linear_token_logprobs(hidden, weight, targets, temperature)
        exact = reference.token_logprobs(logits, targets, temperature)
        for got, want in zip(scores, exact, strict=True):
            assert ((got - want).abs() <= 1e-6 * want.abs().clamp(min=1.0)).all()


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 1000])
def test_sampled_logprob_has_the_bits_of_the_score(vocab: int) -> None:
    logits = _logits(50, vocab)
    for temperature, top_k, top_p in [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.9), (0.7, 20, 0.8)]:
        drawn = _draw(logits, temperature, top_k, top_p)
        scored = token_logprobs(logits, drawn.token, temperature)
        assert_same_bits(scored, (drawn.logprob, drawn.entropy))
        kept = token_logprobs(logits, drawn.token, temperature, drawn.threshold)
        assert_same_bits(kept[0], drawn.kept_logprob)
    drawn = _draw(logits, temperature=0.0)
    assert_same_bits(token_logprobs(logits, drawn.token, 1.0), (drawn.logprob, drawn.entropy))


def test_impossible_tokens_cost_nothing() -> None:
    """-inf logits: scores and gradients of the remaining vocabulary, and no draw lands there."""
    logits = _logits(6, 200)
    masked = logits.clone()
    masked[:, 100:] = -torch.inf
    targets = torch.arange(6)
    masked.requires_grad_()
    logprob, entropy = token_logprobs(masked, targets)
    short = logits[:, :100].clone().requires_grad_()
    short_logprob, short_entropy = token_logprobs(short, targets)
    torch.testing.assert_close((logprob, entropy), (short_logprob, short_entropy))
    (logprob.sum() + 0.3 * entropy.sum()).backward()
    (short_logprob.sum() + 0.3 * short_entropy.sum()).backward()
    torch.testing.assert_close(masked.grad[:, :100], short.grad)
    assert (masked.grad[:, 100:] == 0).all()
    assert (_draw(masked.detach().repeat(200, 1)).token < 100).all()
    assert token_logprobs(masked.detach(), targets + 150)[0].eq(-torch.inf).all()


# Scores over a kept set


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_scores_over_a_kept_set(temperature: float) -> None:
    """Those of the vocabulary cut down to it, and a gradient in it alone."""
    logits = _logits(12, 700, 2.0).requires_grad_()
    thresholds = logits.detach().topk(40).values[:, -1]
    targets = logits.detach().topk(30).indices[:, -1]
    scores = token_logprobs(logits, targets, temperature, thresholds)
    kept = logits.detach() >= thresholds.unsqueeze(1)
    assert kept.sum(1).eq(40).all()
    exact = logits.detach().double().masked_fill(~kept, -torch.inf)
    want = reference.token_logprobs(exact, targets, temperature)
    for got, expected in zip(scores, want, strict=True):
        assert ((got - expected).abs() <= 1e-6).all()
    (scores[0].sum() + 0.3 * scores[1].sum()).backward()
    assert (logits.grad[~kept] == 0).all()
    assert (logits.grad[kept] != 0).all()


def test_a_target_that_has_fallen_out_lowers_the_threshold() -> None:
    """To its own logit: what lies between is kept, too, and its log-probability is finite."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]] * 2)
    targets, thresholds = torch.tensor([0, 3]), torch.tensor([2.0, 2.0])
    logprob, entropy = token_logprobs(logits, targets, 1.0, thresholds)
    short = [logits[0, :2].double(), logits[0, :4].double()]
    for i, part in enumerate(short):
        log_p = part.log_softmax(-1)
        assert logprob[i].item() == pytest.approx(log_p[targets[i]].item(), abs=1e-6)
        assert entropy[i].item() == pytest.approx(-(log_p.exp() * log_p).sum().item(), abs=1e-6)


def test_a_threshold_below_everything_changes_no_bit() -> None:
    logits, targets = _logits(9, 333), torch.arange(9)
    for least in (-torch.inf, -1e30):
        kept = token_logprobs(logits, targets, 0.7, torch.full((9,), least))
        assert_same_bits(kept, token_logprobs(logits, targets, 0.7))


def test_nan_is_not_hidden_by_a_threshold() -> None:
    logits = _logits(3, 300)
    logits[1, 250] = torch.nan
    logprob, entropy = token_logprobs(logits, logits.nan_to_num().argmax(-1), 1.0, torch.zeros(3))
    for score in (logprob, entropy):
        assert score.isnan().tolist() == [False, True, False]


def test_nan_stays_in_its_row() -> None:
    logits = _logits(4, 300)
    logits[1, 250] = torch.nan
    logits[2, 3] = torch.inf
    logprob, entropy = token_logprobs(logits, torch.zeros(4, dtype=torch.int64))
    for score in (logprob, entropy):
        assert score.isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_extreme_temperatures(temperature: float) -> None:
    logits = _logits(20, 500)
    drawn = _draw(logits, temperature)
    exact, _ = reference.token_logprobs(logits.double(), drawn.token, temperature)
    torch.testing.assert_close(drawn.logprob.double(), exact, rtol=1e-6, atol=1e-6)
    if temperature < 1:
        assert torch.equal(drawn.token, logits.argmax(-1))


# Draws


def _chi_square(tokens: Tensor, probabilities: Tensor) -> None:
    """Pearson's test against exact probabilities, over cells that expect five draws or more.

    The streams are fixed, so a run repeats the one before it. A p of 1e-4 would let a right sampler
    fail the dozen cases for one choice of seeds in 800; an error of 1 % in a cell of a tenth of
    the draws has p < 1e-20.
    """
    expected = probabilities.double() * len(tokens)
    observed = torch.bincount(tokens, minlength=len(expected)).double()
    assert (observed[expected == 0] == 0).all()
    cells = expected >= 5
    rest = torch.tensor([observed[~cells].sum(), expected[~cells].sum()], dtype=torch.float64)
    statistic = ((observed - expected).square() / expected)[cells].sum()
    freedom = torch.tensor(int(cells.sum()) - 1, dtype=torch.float64)
    if rest[1] >= 5:
        statistic, freedom = statistic + (rest[0] - rest[1]).square() / rest[1], freedom + 1
    assert freedom >= 1
    p_value = torch.special.gammaincc(freedom / 2, statistic / 2)
    assert 1e-4 < p_value < 1 - 1e-4, f"p = {float(p_value):.2e}, {int(freedom)} degrees of freedom"


@pytest.mark.parametrize(
    "vocab, temperature, top_k, top_p",
    [
        (10, 1.0, 0, 1.0),
        (200, 0.7, 0, 1.0),
        (1000, 1.5, 0, 1.0),
        (200, 1.0, 12, 1.0),
        (200, 1.0, 0, 0.9),
        (200, 1.3, 40, 0.8),
    ],
)
def test_draws_follow_the_distribution(vocab, temperature, top_k, top_p) -> None:
    row = _logits(1, vocab, spread=1.5, seed=vocab)
    drawn = _draw(row.expand(100_000, vocab), temperature, top_k, top_p)
    kept = row[0].double().masked_fill(row[0] < drawn.threshold[0], -torch.inf)
    _chi_square(drawn.token, (kept / temperature).softmax(-1))


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (100, 1.0), (0, 0.6)])
def test_draws_from_a_head_follow_the_distribution(top_k: int, top_p: float) -> None:
    """A vocabulary of 6007 through the head, one stream a sample and one a position."""
    rng = torch.Generator().manual_seed(6)
    weight = 0.4 * torch.randn(6007, 16, generator=rng)
    hidden = torch.randn(1, 16, generator=rng).expand(4000, 16)
    streams = torch.arange(4000) // 8, torch.arange(4000) % 8
    parts = [linear_sample(hidden, weight, 0.9, top_k, top_p, seed, *streams) for seed in range(8)]
    (logits,) = linear(hidden[:1], weight).double()
    kept = logits.masked_fill(logits < parts[0].threshold[0], -torch.inf)
    _chi_square(torch.cat([part.token for part in parts]), (kept / 0.9).softmax(-1))


def test_uniforms_of_neighbouring_streams_are_independent() -> None:
    """Pairs of draws of two equal tokens' halves, over samples, positions, seeds: one bit each."""
    logits = torch.zeros(20_000, 2)
    ids = torch.arange(20_000)
    still = torch.zeros_like(ids)
    streams = {
        "sample": (0, ids, still),
        "next sample": (0, ids + 1, still),
        "position": (0, ids, still + 1),
        "seed": (1, ids, still),
        "along a response": (0, still, ids),
        "other half of the id": (0, ids << 32, still),
    }
    bits = {name: sample(logits, 1.0, 0, 1.0, *s).token for name, s in streams.items()}
    for (a, first), (b, second) in itertools.combinations(bits.items(), 2):
        if {a, b} == {"sample", "next sample"}:
            first, second = first[::2], second[::2]  # shifted by one, they share the other half
        _chi_square(2 * first + second, torch.full((4,), 0.25))


def test_greedy_takes_the_first_of_equal_maxima() -> None:
    logits = _logits(3, 300)
    logits[0, [70, 71, 299]] = 50.0
    logits[1, [0, 64]] = 50.0
    logits[2, [64, 128]] = 50.0
    drawn = _draw(logits, temperature=0.0, top_k=1, top_p=0.1)
    assert drawn.token.tolist() == [70, 0, 64]
    assert drawn.kept_mass.tolist() == [1.0] * 3
    assert drawn.threshold.tolist() == [-torch.inf] * 3


def test_a_draw_belongs_to_its_sample() -> None:
    """Order, batch and thread count change nothing; seed, sample and position do."""
    logits = _logits(1, 5000).expand(64, 5000)
    ids, positions = torch.arange(64) * 2**40, torch.arange(64)
    whole = sample(logits, 1.0, 0, 0.95, 3, ids, positions)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    shuffled = sample(logits, 1.0, 0, 0.95, 3, ids[order], positions[order])
    assert_same_bits([t[order] for t in whole], list(shuffled))
    single = [
        sample(logits[i : i + 1], 1.0, 0, 0.95, 3, ids[i : i + 1], positions[i : i + 1])
        for i in range(64)
    ]
    assert_same_bits(list(whole), [torch.cat(column) for column in zip(*single, strict=True)])
    for other in (
        sample(logits, 1.0, 0, 0.95, 4, ids, positions),
        sample(logits, 1.0, 0, 0.95, 3, ids + 1, positions),
        sample(logits, 1.0, 0, 0.95, 3, ids, positions + 1),
    ):
        assert (other.token != whole.token).sum() > 32


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words) -> None:
    """The vectors published with Random123 (philox4x32, 10 rounds)."""
    assert reference.philox(counter, key) == words


@pytest.mark.parametrize("seed", [0, 2**40 + 3, -1])
def test_kernel_draws_philox_uniforms(seed: int) -> None:
    """Over equal logits the greatest uniform's block wins, and in it the greatest one's token."""
    ids = torch.tensor([0, 1, 2**31, 2**33 + 5, 2**62]).repeat_interleave(40)
    positions = torch.arange(200) * 16_000_000
    drawn = sample(torch.zeros(200, 1024), 1.0, 0, 1.0, seed, ids, positions)
    for token, place in zip(drawn.token.tolist(), zip(ids.tolist(), positions.tolist())):
        block = int(reference.philox_uniforms(seed, *place, 0, 0, 16).argmax())
        begin = block * 64
        clocks = reference.philox_uniforms(seed, *place, 1 << 31, begin, begin + 64)
        assert token == begin + int(clocks.argmax())


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (50, 1.0), (0, 0.9), (100, 0.8)])
def test_draws_are_those_of_the_reference(top_k: int, top_p: float) -> None:
    logits = _logits(200, 1001)
    ids, positions = torch.arange(200), torch.arange(200) % 7
    arguments = (0.8, top_k, top_p, 5, ids, positions)
    assert torch.equal(sample(logits, *arguments).token, reference.sample(logits, *arguments)[0])


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_small_change_of_the_distribution_rarely_changes_the_draw(top_p: float) -> None:
    """Two races, each with another winner in at most 2 d of all draws, where d is the total
    variation: of the blocks, and within the winner. Inverse transform has no such bound.
    """
    count, vocab = 4000, 20_000
    row = _logits(1, vocab, spread=2.0, seed=1)
    nudged = row + 0.02 * _logits(1, vocab, spread=1.0, seed=2)
    ids, positions = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    before, after = (
        sample(logits.expand(count, vocab), 1.0, 0, top_p, 0, ids, positions).token
        for logits in (row, nudged)
    )
    variation = (row.softmax(-1) - nudged.softmax(-1)).abs().sum().item() / 2
    changed = (before != after).double().mean().item()
    assert 0 < changed < 4 * variation + 4 * math.sqrt(4 * variation / count)


# Kept sets


def _kept_by_transformers(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    from transformers.generation import logits_process

    scores = logits.double()
    warpers = [logits_process.TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(logits_process.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(logits_process.TopPLogitsWarper(top_p))
    for warper in warpers:
        scores = warper(None, scores)
    return scores > -torch.inf


@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [
        (1.0, 1, 1.0),
        (0.7, 50, 1.0),
        (1.0, 700, 1.0),
        (1.0, 5000, 1.0),
        (1.0, 0, 0.5),
        (0.6, 0, 0.95),
        (1.5, 0, 0.999),
        (1.0, 0, 0.01),
        (0.8, 40, 0.9),
        (1.2, 2000, 0.7),
    ],
)
def test_kept_set_is_that_of_transformers(spread, temperature, top_k, top_p) -> None:
    logits = _logits(40, 5003, spread, seed=4)
    drawn = _draw(logits, temperature, top_k, top_p)
    kept = logits >= drawn.threshold.unsqueeze(-1)
    assert torch.equal(kept, _kept_by_transformers(logits, temperature, top_k, top_p))
    assert kept.gather(1, drawn.token.unsqueeze(1)).all()
    mass = (logits.double() / temperature).softmax(-1).masked_fill(~kept, 0).sum(-1)
    torch.testing.assert_close(drawn.kept_mass.double(), mass, rtol=1e-6, atol=0)
    least = logits.masked_fill(~kept, torch.inf).amin(-1)
    assert_same_bits(
        drawn.threshold, least
    )  # a logit of the row itself: the mask can be rebuilt from it


def test_ties_at_the_threshold_are_kept_whole() -> None:
    logits = torch.tensor([[4.0, 2.0, 2.0, 2.0, 0.0, -0.0, -5.0]])
    by_count = _draw(logits, top_k=2)
    assert by_count.threshold.item() == 2.0
    weights = logits[0].double().exp()
    torch.testing.assert_close(
        by_count.kept_mass.item(), (weights[:4].sum() / weights.sum()).item()
    )
    assert _draw(logits, top_k=5).threshold.item() == 0.0
    assert _draw(logits, top_k=6).threshold.item() == 0.0  # -0 and 0 are one logit
    assert _draw(logits, top_p=0.8).threshold.item() == 2.0


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (7, 1.0), (9, 1.0)])
def test_no_truncation_keeps_everything(top_k: int, top_p: float) -> None:
    drawn = _draw(_logits(3, 7), top_k=top_k, top_p=top_p)
    assert drawn.kept_mass.tolist() == [1.0] * 3
    assert drawn.threshold.tolist() == [-torch.inf] * 3


@pytest.mark.parametrize("top_k, top_p", [(3, 1.0), (0, 0.5), (20, 0.9)])
def test_one_possible_token(top_k: int, top_p: float) -> None:
    logits = torch.full((4, 130), -torch.inf)
    logits[:, 77] = -3.0
    drawn = _draw(logits, top_k=top_k, top_p=top_p)
    assert drawn.token.tolist() == [77] * 4
    assert drawn.logprob.tolist() == [0.0] * 4
    assert drawn.entropy.tolist() == [0.0] * 4
    assert drawn.kept_mass.tolist() == [1.0] * 4
