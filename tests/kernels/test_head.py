"""The head without logits: bits of the head with them, its gradients, and what is never held."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import pytest
import torch

from hybrid_kernels.ops.head import linear_sample, linear_token_logprobs
from hybrid_kernels.ops.linear import linear
from hybrid_kernels.ops.sampling import sample, token_logprobs
from hybrid_kernels.reference import sampling as reference
from hybrid_kernels.testing import assert_as_accurate, assert_same_bits

ROWS, WIDTH, VOCAB, TEMPERATURE = 37, 48, 301, 0.8
RULES = [
    (1.0, 0, 1.0),
    (0.0, 0, 1.0),
    (0.7, 5, 1.0),
    (1.3, 0, 0.9),
    (1.0, 0, 0.999999),
    (0.9, 40, 0.8),
    (1.0, 1, 1.0),
    (2.0, 2000, 1.0),
]


def _problem(rows: int = ROWS, vocab: int = VOCAB, sharpness: float = 0.25, width: int = WIDTH):
    rng = torch.Generator().manual_seed(rows * 1000 + vocab)
    hidden = torch.randn(rows, width, generator=rng)
    weight = sharpness * torch.randn(vocab, width, generator=rng)
    return hidden, weight, torch.randint(vocab, (rows,), generator=rng)


def _streams(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(rows) * 2**33 + 1, torch.arange(rows) % 7


# Scores


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 38, 1000])
def test_chunks_change_no_bit(chunk: int) -> None:
    hidden, weight, targets = _problem()
    whole = token_logprobs(linear(hidden, weight), targets, TEMPERATURE)
    scores = linear_token_logprobs(hidden, weight, targets, TEMPERATURE, chunk_rows=chunk)
    assert_same_bits(scores, whole)


@pytest.mark.parametrize("rows", [1, 2, 7, 63, 64, 65, 256, 257, 300])
@pytest.mark.parametrize("vocab", [1, 64, 65, 1000])
def test_scores_have_the_bits_of_the_logits_scores(rows: int, vocab: int) -> None:
    hidden, weight, targets = _problem(rows, vocab)
    logits = linear(hidden, weight)
    thresholds = logits.quantile(0.7, dim=-1)  # above some targets, below others
    for least in (None, thresholds):
        scores = linear_token_logprobs(hidden, weight, targets, TEMPERATURE, least)
        assert_same_bits(scores, token_logprobs(logits, targets, TEMPERATURE, least))


@pytest.mark.parametrize("rows, width", [(31, 4096), (33, 4096), (97, 1537), (256, 1100)])
def test_scores_of_wide_rows(rows: int, width: int) -> None:
    """Wide rows pass in several parts, each of which reads the whole head."""
    hidden, weight, targets = _problem(rows, VOCAB, 0.02, width)
    scores = linear_token_logprobs(hidden, weight, targets, TEMPERATURE)
    assert_same_bits(scores, token_logprobs(linear(hidden, weight), targets, TEMPERATURE))


@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("truncated", [False, True])
def test_gradients(chunk: int, truncated: bool) -> None:
    hidden, weight, targets = _problem()
    rng = torch.Generator().manual_seed(1)
    grads = [torch.randn(ROWS, generator=rng) for _ in range(2)]
    thresholds = None
    if truncated:  # at least 1e-4 from every logit, a target's own among them for some rows
        ordered = (hidden.double() @ weight.double().T).sort(-1).values
        thresholds = ((ordered[:, 99] + ordered[:, 100]) / 2).float()

    def gradients(score, dtype=torch.float32):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        return torch.autograd.grad(score(*leaves), leaves, [g.to(dtype) for g in grads])

    def plain(h, w):
        return reference.token_logprobs(h @ w.T, targets, TEMPERATURE, thresholds)

    def chunked(h, w):
        return linear_token_logprobs(h, w, targets, TEMPERATURE, thresholds, chunk)

    exact = gradients(plain, torch.float64)
    for got, want, ordinary in zip(gradients(chunked), exact, gradients(plain), strict=True):
        assert_as_accurate(got, want, ordinary, factor=2.0)


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_wanted_gradients_are_formed(wanted: int) -> None:
    leaves = list(_problem())
    leaves[wanted].requires_grad_()
    linear_token_logprobs(*leaves)[0].sum().backward()
    assert leaves[wanted].grad is not None
    assert leaves[1 - wanted].grad is None


def test_nothing_as_large_as_the_logits_is_kept() -> None:
    hidden, weight, targets = (t.repeat(40, *[1] * (t.dim() - 1)) for t in _problem())
    hidden.requires_grad_()
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_token_logprobs(hidden, weight, targets, chunk_rows=16)
    assert sum(kept) <= hidden.numel() + weight.numel() + 4 * targets.numel()


def _between_the_middle_ones(logits: torch.Tensor) -> torch.Tensor:
    """A threshold for each row that no rounding of a logit crosses."""
    ordered, half = logits.sort(-1).values, logits.shape[1] // 2
    return ordered[:, half - 1 : half + 1].mean(-1)


@pytest.mark.filterwarnings("ignore:hybrid_kernels:RuntimeWarning")
@pytest.mark.parametrize("truncated", [False, True])
def test_other_dtypes_take_the_reference_in_chunks(truncated: bool, monkeypatch) -> None:
    monkeypatch.delenv("HYBRID_KERNELS_REQUIRE_NATIVE")
    hidden, weight, targets = _problem()
    hidden, weight = hidden.double().requires_grad_(), weight.double()
    logits = hidden @ weight.T
    thresholds = _between_the_middle_ones(logits.detach()) if truncated else None
    whole = reference.token_logprobs(logits, targets, 1.0, thresholds)
    parts = linear_token_logprobs(hidden, weight, targets, 1.0, thresholds, 5)
    torch.testing.assert_close(parts, whole)
    (want,) = torch.autograd.grad(sum(s.sum() for s in whole), hidden)
    (got,) = torch.autograd.grad(sum(s.sum() for s in parts), hidden)
    torch.testing.assert_close(got, want)


# Draws


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 130, 5003])
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 63, 64, 65])
def test_draws_have_the_bits_of_the_logits_draws(rows: int, vocab: int) -> None:
    hidden, weight, _ = _problem(rows, vocab)
    logits, streams = linear(hidden, weight), _streams(rows)
    for rule in RULES:
        drawn = linear_sample(hidden, weight, *rule, 3, *streams)
        assert_same_bits(list(drawn), list(sample(logits, *rule, 3, *streams)))


@pytest.mark.parametrize("top_k, top_p", [(0, 0.9999), (0, 0.97), (70, 0.9)])
def test_flat_distributions_are_fetched_in_parts(top_k: int, top_p: float) -> None:
    """A row may need all of its 1025 blocks: 256 are in the cache, others of 11 rows are a part."""
    hidden, weight, _ = _problem(64, 1025 * 64 - 5, sharpness=0.01)
    rule, streams = (1.0, top_k, top_p), _streams(64)
    drawn = linear_sample(hidden, weight, *rule, 3, *streams)
    assert_same_bits(list(drawn), list(sample(linear(hidden, weight), *rule, 3, *streams)))


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (3, 1.0), (70, 1.0), (0, 0.5)])
def test_equal_logits(top_k: int, top_p: float) -> None:
    """Tokens that share a row of the head tie exactly, across blocks, too."""
    hidden, weight, _ = _problem(5, 40)
    weight = weight.repeat(9, 1)
    rule, streams = (1.0, top_k, top_p), _streams(5)
    logits = linear(hidden, weight)
    drawn = linear_sample(hidden, weight, *rule, 3, *streams)
    assert_same_bits(list(drawn), list(sample(logits, *rule, 3, *streams)))
    kept = (logits >= drawn.threshold.unsqueeze(1)).sum(1)
    assert kept.remainder(9).eq(0).all()


@pytest.mark.parametrize("rule", RULES[:6])
def test_a_draw_belongs_to_its_sample(rule, threads) -> None:
    """Neither the batch, nor the place in it, nor a rank's share of it, nor threads matter."""
    hidden, weight, _ = _problem(64, 3000)
    ids, positions = _streams(64)
    whole = linear_sample(hidden, weight, *rule, 3, ids, positions)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for ranks, count in product((1, 3, 64), (1, 2)):
        threads(count)
        for share in (order[rank::ranks] for rank in range(ranks)):
            part = linear_sample(hidden[share], weight, *rule, 3, ids[share], positions[share])
            assert_same_bits(list(part), [column[share] for column in whole])


# Memory

MEMORY = """
import torch
from hybrid_kernels.ops.head import linear_sample, linear_token_logprobs

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

torch.set_num_threads(2)
rows, vocab, width = 128, 1 << 19, 16
hidden, weight = torch.randn(rows, width), torch.randn(vocab, width)
ids = torch.arange(rows)
rules = ((1.0, 0, 1.0), (0.0, 0, 1.0), (1.0, 50, 1.0), (1.0, 0, 0.8))
small = hidden[:1]
for rule in rules:  # once small: code and pools are in place
    linear_sample(small, weight, *rule, 0, ids[:1], ids[:1])
linear_token_logprobs(small, weight, ids[:1])
before = peak()
for rule in rules:
    linear_sample(hidden, weight, *rule, 0, ids, ids)
linear_token_logprobs(hidden, weight, ids, 1.0, torch.zeros(rows))
print(peak() - before, rows * vocab * 4 / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_logits_are_never_in_memory() -> None:
    """256 MiB of them, if they were; three floats in 64 are 12 MiB, the blocks kept 16 MiB."""
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    grown, logits = map(float, result.stdout.split())
    assert grown < logits / 4
