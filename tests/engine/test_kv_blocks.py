"""The block pool against a dictionary of reference counts."""

from __future__ import annotations

import random

import pytest

from hybrid_kernels import native_module

KvBlockPool = native_module().KvBlockPool


@pytest.mark.parametrize("seed", range(5))
def test_random_traffic_matches_a_dictionary(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randrange(1, 40)
    pool, model, peak = KvBlockPool(size), {}, 0
    for _ in range(2000):
        action = rng.random()
        if action < 0.4 and len(model) < size:
            block = pool.allocate()
            assert block not in model
            assert 0 <= block < size
            model[block] = 1
        elif action < 0.6 and model:
            block = rng.choice(list(model))
            pool.retain(block)
            model[block] += 1
        elif model:
            block = rng.choice(list(model))
            model[block] -= 1
            assert pool.release(block) == (model[block] == 0)
            if model[block] == 0:
                del model[block]
        peak = max(peak, len(model))
        assert pool.used == len(model)
        assert pool.available == size - len(model)
        assert all(pool.references(block) == model.get(block, 0) for block in range(size))
    assert pool.peak_used == peak


def test_a_freed_block_is_the_next_one_handed_out() -> None:
    pool = KvBlockPool(8)
    blocks = [pool.allocate() for _ in range(4)]
    pool.release(blocks[1])
    assert pool.allocate() == blocks[1]


@pytest.mark.parametrize("misuse", ["retain", "release"])
def test_touching_a_free_block_is_refused(misuse: str) -> None:
    pool = KvBlockPool(2)
    with pytest.raises(RuntimeError, match="block 0 is free"):
        getattr(pool, misuse)(0)


def test_allocating_from_an_empty_pool_is_refused() -> None:
    pool = KvBlockPool(1)
    pool.allocate()
    with pytest.raises(RuntimeError, match="no free block of 1"):
        pool.allocate()


@pytest.mark.parametrize("block", [-1, 2])
def test_a_block_outside_the_pool_is_refused(block: int) -> None:
    with pytest.raises(RuntimeError, match=f"no block {block}"):
        KvBlockPool(2).references(block)
