"""What stays and what is streamed: a pure function of sizes and one number."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_engine.engine.gather_policy import (
    GatherPolicy,
    Group,
    PartSizes,
    describe,
    pinning_all,
    solve,
    solve_together,
)
from hybrid_engine.errors import UserError

RANKS = 2
GROUP = Group(RANKS)


def sizes_of(blocks: int, block: int = 640, before: int = 1280, after: int = 64) -> PartSizes:
    kept = (before, *[block] * blocks, after)
    return PartSizes(kept, tuple(size // RANKS for size in kept))


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_models_without_a_layer_to_spare_keep_all(blocks: int) -> None:
    sizes = sizes_of(blocks)
    enough = pinning_all(blocks).held_bytes(sizes, GROUP)
    assert solve(sizes, GROUP, enough) == pinning_all(blocks)
    with pytest.raises(UserError, match=f"at least {enough} bytes"):
        solve(sizes, GROUP, enough - 1)


def test_held_bytes_by_hand() -> None:
    sizes = sizes_of(6)
    everything = 1280 + 6 * 640 + 64
    # Own shard and everyone's: of four blocks, the embedding, and what follows the blocks.
    assert pinning_all(6).held_bytes(sizes, GROUP) == everything + 3 * (4 * 320 + 640 + 32)
    policy = GatherPolicy(6, pinned=2)
    held = 1280 + 64 + (2 + 2) * 640 + 3 * (2 * (320 + 8) + 640 + 32 + 2 * 8)
    assert policy.held_bytes(sizes, GROUP) == held
    assert policy.pass_bytes(sizes, GROUP) == 4 * (320 + 8)
    # In shared memory only the own shards: of twice as many blocks, and one.
    shared = Group(RANKS, shared_memory=True)
    held = 1280 + 64 + (2 + 2) * 640 + 5 * (320 + 8) + 640 + 32 + 2 * 8
    assert policy.held_bytes(sizes, shared) == held


@pytest.mark.parametrize(("lent", "own"), [(0, 2592), (592, 2000), (9999, 0)])
def test_one_copy_counts_by_its_part_beside_what_is_lent(lent: int, own: int) -> None:
    sizes, group = sizes_of(6), Group(RANKS, shared_memory=True, one_copy=True, lent=lent)
    assert (
        pinning_all(6).held_bytes(sizes, group) == own == max(0, (1280 + 6 * 640 + 64) // 2 - lent)
    )
    assert solve(sizes, group, own) == pinning_all(6)
    # What is streamed comes to each rank in its own time, as without a copy for all.
    alone, streamed = Group(RANKS, shared_memory=True), GatherPolicy(6, pinned=0)
    assert streamed.held_bytes(sizes, group) == streamed.held_bytes(sizes, alone)


@given(st.integers(3, 70), st.integers(0, 70))
def test_streamed_layers_are_spread_and_never_share_a_place_with_their_neighbour(
    blocks: int, pinned: int
) -> None:
    policy = GatherPolicy(blocks, min(pinned, blocks))
    streamed = policy.streamed
    assert len(streamed) == blocks - policy.pinned
    assert sorted(set(streamed)) == list(streamed)
    gaps = [later - earlier for earlier, later in zip(streamed, streamed[1:], strict=False)]
    assert max(gaps, default=1) - min(gaps, default=1) <= 1
    places = [policy.slots()[block] for block in streamed]
    assert all(a != b for a, b in zip(places, places[1:], strict=False))
    assert set(places) <= set(range(policy.ring))


@given(st.integers(3, 40), st.integers(0, 60000), st.integers(64, 4096))
def test_the_limit_is_kept_with_as_little_streamed_as_possible(
    blocks: int, limit: int, block: int
) -> None:
    sizes = sizes_of(blocks, block)
    every = [pinning_all(blocks)] + [GatherPolicy(blocks, k) for k in range(blocks - 2)]
    fitting = [policy for policy in every if policy.held_bytes(sizes, GROUP) <= limit]
    if not fitting:
        with pytest.raises(UserError, match="weight_bytes"):
            solve(sizes, GROUP, limit)
        leanest = solve(sizes, GROUP, limit, at_least=True)
        least = min(policy.held_bytes(sizes, GROUP) for policy in every)
        assert leanest.held_bytes(sizes, GROUP) == least
        return
    found = solve(sizes, GROUP, limit)
    assert found.held_bytes(sizes, GROUP) <= limit
    # An odd number of streamed layers would have two places of a round's ends collide.
    assert max(policy.pinned for policy in fitting) - found.pinned <= 1


def test_the_poorest_rank_decides() -> None:
    sizes = sizes_of(8)
    most, least = (GatherPolicy(8, k).held_bytes(sizes, GROUP) for k in (4, 0))
    assert solve_together([sizes, sizes], GROUP, [most, least]).pinned == 0
    assert solve_together([sizes, sizes], GROUP, [most, 10 * most]).pinned == 4


def test_the_plan_is_one_line() -> None:
    sizes = sizes_of(8, 2**20, 2**20, 0)
    assert describe(GatherPolicy(8, 4), sizes, GROUP, 20 * 2**20, 1) == (
        "generation keeps 4 of 8 layers and streams 4 through 2 places: 11.5 MiB of at most "
        "20.0 MiB; 2.0 MiB to receive a pass"
    )
    assert describe(pinning_all(8), sizes, GROUP, None, 2) == (
        "generation keeps all 8 layers (1/2 of each) once gathered: 16.5 MiB"
    )
    one_copy = Group(RANKS, shared_memory=True, one_copy=True, lent=2**20)
    assert describe(pinning_all(8), sizes, one_copy, 20 * 2**20, 2) == (
        "generation keeps all 8 layers once gathered, in one copy for 2 ranks: 3.5 MiB of at most "
        "20.0 MiB a rank beside 1.0 MiB where gradients lie in training"
    )
