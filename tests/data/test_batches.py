"""The order of training is a function of its arguments, resumed or not, split over ranks or not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_engine.data import Batches, rank_share

SHAPES = [(1, 1), (10, 3), (12, 4), (3, 8), (7, 7), (100, 32)]


@pytest.mark.parametrize(("count", "size"), SHAPES)
@pytest.mark.parametrize("epochs", [1, 2, 2.5, 0.3])
def test_every_epoch_is_a_permutation(count, size, epochs):
    batches = list(Batches(count, size, seed=1, epochs=epochs))
    samples = [index for batch in batches for index in batch]
    assert len(samples) == max(1, round(epochs * count))
    assert all(len(batch) == size for batch in batches[:-1])
    for start in range(0, len(samples) - count + 1, count):
        assert sorted(samples[start : start + count]) == list(range(count))


@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 99), st.integers(0, 30))
def test_resuming_gives_the_batches_of_an_uninterrupted_run(count, size, seed, step):
    batches = Batches(count, size, seed, epochs=3)
    whole = list(batches)
    assert len(whole) == len(batches)
    assert list(Batches(count, size, seed, epochs=3).from_step(step)) == whole[step:]


def test_steps_bound_the_epochs_or_stand_alone():
    assert len(Batches(100, 10, 0, epochs=1, max_steps=3)) == 3
    assert len(Batches(100, 10, 0, epochs=1, max_steps=30)) == 10
    assert len(Batches(100, 10, 0, epochs=0, max_steps=30)) == 30
    assert all(len(batch) == 10 for batch in Batches(7, 10, 0, epochs=0, max_steps=4))


def test_epochs_and_seeds_differ():
    first, second = Batches(50, 50, 0, epochs=2)
    assert first != second
    assert first != next(iter(Batches(50, 50, 1, epochs=1)))


@pytest.mark.parametrize("arguments", [(0, 1, 0, 1), (1, 0, 0, 1), (1, 1, 0, 0), (1, 1, 0, -1)])
def test_impossible_plans_are_refused(arguments):
    with pytest.raises(ValueError, match="positive"):
        Batches(*arguments)


@given(st.lists(st.integers()), st.integers(1, 9))
def test_ranks_share_a_batch_without_overlap(indices, world):
    shares = [rank_share(indices, rank, world) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == sorted(indices)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_a_rank_outside_its_world():
    with pytest.raises(ValueError, match="rank 2 is outside a world of 2"):
        rank_share([1], 2, 2)
