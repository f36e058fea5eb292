"""Selection, minibatches and packed passes keep rows whole and aligned."""

from dataclasses import replace

import pytest
import torch

from hybrid_engine.rl.experience import Experience
from hybrid_engine.rl.padding import length_mask, spread


def make_experience(lengths: list[int]) -> Experience:
    """Row b holds the numbers 100 b + t, so any misalignment shows."""
    tokens = [[100 * b + t for t in range(n)] for b, n in enumerate(lengths)]
    flat = torch.tensor([float(token) for row in tokens for token in row])
    padded = spread(flat, torch.tensor(lengths), max(lengths, default=0))
    return Experience(
        prompts=[[b] * (b + 1) for b in range(len(lengths))],
        tokens=tokens,
        lengths=torch.tensor(lengths),
        old_logprobs=padded,
        ref_logprobs=padded + 0.25,
        rewards=padded + 0.5,
        advantages=padded + 0.75,
        values=padded,
        returns=padded,
    )


def rows_of(experience: Experience) -> list[list[int]]:
    for row, tokens in zip(experience.old_logprobs, experience.tokens, strict=True):
        assert row[: len(tokens)].tolist() == tokens
        assert row[len(tokens) :].abs().sum() == 0
    return experience.tokens


def test_select_keeps_order_and_cuts_the_padding():
    part = make_experience([5, 1, 3]).select([2, 1])
    assert rows_of(part) == [[200, 201, 202], [100]]
    assert part.prompts == [[2, 2, 2], [1, 1]]
    assert part.old_logprobs.shape == (2, 3)
    assert part.mask.tolist() == [[True, True, True], [True, False, False]]
    assert part.num_tokens == 4


def test_thresholds_follow_their_tokens():
    whole = make_experience([5, 1, 3])
    assert whole.flat_thresholds is None
    part = replace(whole, thresholds=whole.old_logprobs + 0.125).select([2, 1])
    assert part.flat_thresholds.tolist() == [200.125, 201.125, 202.125, 100.125]


def test_empty_selection_has_no_width():
    empty = make_experience([2, 2]).select([])
    assert len(empty) == 0
    assert empty.rewards.shape == (0, 0)
    assert empty.num_tokens == 0


def test_without_a_critic():
    full = make_experience([2, 1])
    bare = Experience(
        full.prompts,
        full.tokens,
        full.lengths,
        full.old_logprobs,
        full.ref_logprobs,
        full.rewards,
        full.advantages,
    )
    assert bare.select([1]).values is None


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_minibatches_partition_the_rows(count):
    experience = make_experience([3, 1, 4, 1, 5, 2, 6])
    parts = [rows_of(part) for part in experience.minibatches(count, seed=3)]
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sorted(row for part in parts for row in part) == sorted(experience.tokens)


def test_minibatches_depend_on_the_seed_alone():
    experience = make_experience([1] * 16)
    order = [part.tokens for part in experience.minibatches(2, seed=5)]
    torch.manual_seed(123)
    assert [part.tokens for part in experience.minibatches(2, seed=5)] == order
    assert [part.tokens for part in experience.minibatches(2, seed=6)] != order


def test_misaligned_rows_are_refused():
    good = make_experience([2, 1])
    with pytest.raises(AssertionError, match="lengths differ from tokens"):
        Experience(good.prompts, good.tokens, torch.tensor([1, 1]), *[good.rewards] * 4)
    with pytest.raises(AssertionError, match="ref_logprobs has shape"):
        Experience(
            good.prompts,
            good.tokens,
            good.lengths,
            good.rewards,
            good.rewards[:, :1],
            *[good.rewards] * 2,
        )


def test_spreading_is_differentiable():
    lengths = torch.tensor([2, 0, 3])
    flat = torch.arange(1.0, 6.0, requires_grad=True)
    padded = spread(flat, lengths, width=4)
    assert padded.tolist() == [[1, 2, 0, 0], [0, 0, 0, 0], [3, 4, 5, 0]]
    (padded * torch.arange(12.0).reshape(3, 4)).sum().backward()
    assert flat.grad.tolist() == [0, 1, 8, 9, 10]
    assert length_mask(lengths, 4).sum() == 5
