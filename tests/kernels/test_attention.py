"""A token's attention has the same bits in training, prefill and decode; and it is attention."""

from __future__ import annotations

import math

import pytest
import torch

from hybrid_kernels import ops
from hybrid_kernels.testing import as_accurate, assert_same_bits

LENGTHS = [1, 2, 63, 64, 65, 127, 130]
BLOCK = 64
# (query heads, key/value heads, head size, ALiBi, window)
LAYOUTS = [
    (2, 2, 16, False, 0),
    (3, 1, 64, False, 0),
    (8, 1, 80, False, 0),
    (4, 2, 24, True, 0),
    (3, 1, 64, False, 40),
    (2, 1, 7, True, 65),
]
by_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


class Problem:
    """Packed sequences of all `LENGTHS`, and a paged cache for them with shuffled blocks."""

    def __init__(
        self, layout: tuple[int, int, int, bool, int], lengths: list[int] = LENGTHS
    ) -> None:
        heads, kv_heads, dim, alibi, self.window = layout
        rng = torch.Generator().manual_seed(0)
        self.lengths = lengths
        self.starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        tokens = self.starts[-1]
        self.q = torch.randn(tokens, heads, dim, generator=rng)
        self.k, self.v = (torch.randn(tokens, kv_heads, dim, generator=rng) for _ in range(2))
        self.scale = dim**-0.5
        self.slopes = 2.0 ** -torch.arange(1, heads + 1) if alibi else None
        most = -(-max(lengths) // BLOCK)
        blocks = torch.randperm(len(lengths) * most, generator=rng).int()
        self.tables = blocks.view(len(lengths), most)
        # Slots not yet written hold NaN, as a poisoned freed block would.
        self.cache = torch.full((len(blocks), kv_heads, 2, BLOCK, dim), math.nan)

    def train(self) -> torch.Tensor:
        cu_seqlens = torch.tensor(self.starts, dtype=torch.int32)
        return ops.attention(
            self.q, self.k, self.v, cu_seqlens, self.scale, self.slopes, self.window
        )

    def extend(self, bounds: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        """One forward of the engine: appends tokens [first, end) of each sequence and attends."""
        rows, slots = [], []
        for sequence, first, end in bounds:
            for position in range(first, end):
                rows.append(self.starts[sequence] + position)
                block = self.tables[sequence, position // BLOCK].item()
                slots.append(block * BLOCK + position % BLOCK)
        ops.kv_append(self.k[rows], self.v[rows], self.cache, torch.tensor(slots))
        sizes = [end - first for _, first, end in bounds]
        out = ops.paged_attention(
            self.q[rows],
            self.cache,
            self.tables[[sequence for sequence, _, _ in bounds]],
            torch.tensor([end for _, _, end in bounds], dtype=torch.int32),
            torch.tensor([0, *sizes]).cumsum(0, dtype=torch.int32),
            self.scale,
            self.slopes,
            self.window,
        )
        return list(out.split(sizes))

    def expected(
        self, trained: torch.Tensor, bounds: list[tuple[int, int, int]]
    ) -> list[torch.Tensor]:
        return [trained[self.starts[s] + first : self.starts[s] + end] for s, first, end in bounds]

    def check(self, trained: torch.Tensor, bounds: list[tuple[int, int, int]]) -> None:
        assert_same_bits(self.extend(bounds), self.expected(trained, bounds))


@by_layout
def test_prefill_has_the_bits_of_training(layout, threads) -> None:
    problem = Problem(layout)
    threads(1)
    trained = problem.train()
    threads(2)
    problem.check(trained, [(i, 0, length) for i, length in enumerate(LENGTHS)])


@by_layout
def test_chunked_prefill_has_the_bits_of_training(layout) -> None:
    problem = Problem(layout)
    trained = problem.train()
    for chunk in range(0, max(LENGTHS), 37):
        live = [(i, chunk, min(chunk + 37, n)) for i, n in enumerate(LENGTHS) if n > chunk]
        problem.check(trained, live)


@by_layout
def test_decode_has_the_bits_of_training(layout) -> None:
    """Token by token from the start, all sequences until they end: the batch shrinks, too."""
    problem = Problem(layout)
    trained = problem.train()
    for position in range(max(LENGTHS)):
        live = [(i, position, position + 1) for i, n in enumerate(LENGTHS) if n > position]
        problem.check(trained, live)


@by_layout
def test_decode_after_prefill_mixed_with_prefill(layout) -> None:
    """Sequences that decode share a forward with one that prefills."""
    problem = Problem(layout)
    trained = problem.train()
    problem.check(trained, [(3, 0, 60), (5, 0, 100)])
    problem.check(trained, [(3, 60, 61), (6, 0, 130), (5, 100, 101)])
    problem.check(trained, [(3, 61, 64), (4, 0, 65), (5, 101, 127)])


@by_layout
@pytest.mark.parametrize("lengths", [[700], [641, 5, 130]], ids=str)
def test_long_contexts_split_between_threads_have_the_bits_of_training(
    layout, lengths: list[int], threads
) -> None:
    """One token, then a few, of sequences whose tiles several tasks share."""
    problem = Problem(layout, lengths)
    trained = problem.train()
    before = [(i, 0, max(n - 4, 0)) for i, n in enumerate(lengths)]
    problem.check(trained, before)
    for count in (1, 2, 5):
        threads(count)
        problem.check(trained, [(i, n - 4, n - 3) for i, n in enumerate(lengths)])
        problem.check(trained, [(i, n - 4, n) for i, n in enumerate(lengths)])


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
def test_matches_scaled_dot_product_attention(heads: int, kv_heads: int) -> None:
    problem = Problem((heads, kv_heads, 32, False, 0), lengths=[200])
    leaves = [t.requires_grad_() for t in (problem.q, problem.k, problem.v)]
    out = problem.train()
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    actual = (out, *torch.autograd.grad(out, leaves, grad))

    def sdpa(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = (t.transpose(0, 1)[None] for t in tensors)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        out = out[0].transpose(0, 1)
        return out, *torch.autograd.grad(out, tensors, grad.to(out))

    doubles = [t.detach().double().requires_grad_() for t in leaves]
    # Sums of 32 and 200 terms in order instead of in vector lanes: a few times the error.
    as_accurate(actual, sdpa(*doubles), sdpa(*leaves), factor=4.0)


def test_reads_a_fused_projection_in_place() -> None:
    heads, kv_heads, dim = 6, 2, 24
    fused = torch.randn(
        150, (heads + 2 * kv_heads) * dim, generator=torch.Generator().manual_seed(0)
    )
    parts = fused.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
    views = [part.unflatten(1, (-1, dim)) for part in parts]
    cu_seqlens = torch.tensor([0, 70, 150], dtype=torch.int32)
    copies = [view.clone() for view in views]
    assert_same_bits(
        ops.attention(*views, cu_seqlens, 0.2), ops.attention(*copies, cu_seqlens, 0.2)
    )


def test_future_keys_do_not_matter() -> None:
    """They share a register tile with earlier rows, but reach none of their bits."""
    problem = Problem((3, 1, 64, False, 0), lengths=[130])
    before = problem.train()[:80]
    problem.k[80:], problem.v[80:] = 1e30, -1e30
    assert_same_bits(problem.train()[:80], before)


def test_extreme_scores_stay_finite() -> None:
    problem = Problem((2, 1, 16, False, 0), lengths=[100])
    problem.q *= 1e4
    problem.k *= 1e4
    out = problem.train()
    assert out.isfinite().all()
    best = (problem.q[99] @ problem.k[:, 0].T).argmax(dim=1)  # one key takes everything
    torch.testing.assert_close(out[99], problem.v[best, 0], rtol=0, atol=0)


def test_a_tile_of_overflowed_scores_counts_for_nothing() -> None:
    """The query's products with the whole first tile are -inf; the second tile has finite ones."""
    problem = Problem((2, 1, 16, False, 0), lengths=[100])
    problem.q[:] = 1e20
    problem.k[:64], problem.k[64:] = -1e20, 0.0
    out = problem.train()
    mean = problem.v[64:].double().mean(dim=0)
    torch.testing.assert_close(out[99], mean.float().expand(2, -1), rtol=0, atol=1e-6)
    problem.extend([(0, 0, 99)])
    assert_same_bits(problem.extend([(0, 99, 100)]), [out[99:]])


def test_rope_turns_back_and_matches_transformers_form() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k = torch.randn(9, 4, 20, generator=rng), torch.randn(9, 2, 20, generator=rng)
    angles = torch.randn(50, 8, generator=rng)
    cos, sin = angles.cos(), angles.sin()
    positions = torch.randint(50, (9,), generator=rng, dtype=torch.int32)
    turned = ops.rope(q, k, cos, sin, positions)
    back = ops.rope(*turned, cos, -sin, positions)
    torch.testing.assert_close(back[0], q, rtol=0, atol=4e-6)
    torch.testing.assert_close(back[1], k, rtol=0, atol=4e-6)
    # x * cos + rotate_half(x) * sin over the first 16 of 20 elements
    x = q[..., :16]
    half = torch.cat((-x[..., 8:], x[..., :8]), dim=-1)
    c, s = (torch.cat((t, t), -1)[positions.long()][:, None] for t in (cos, sin))
    torch.testing.assert_close(turned[0][..., :16], x * c + half * s, rtol=0, atol=2e-6)
    assert_same_bits(turned[0][..., 16:], q[..., 16:])


def test_rope_and_append_in_one_have_the_bits_of_the_two() -> None:
    """Of views of a fused projection, as a decode step has them."""
    rng = torch.Generator().manual_seed(0)
    qkv = torch.randn(33, (6 + 2 * 2) * 40, generator=rng).split([240, 80, 80], dim=1)
    q, k, v = (part.unflatten(1, (-1, 40)) for part in qkv)
    angles = torch.randn(50, 12, generator=rng)
    positions = torch.randint(50, (33,), generator=rng, dtype=torch.int32)
    slots = torch.randperm(128, generator=rng)[:33]
    apart, together = torch.zeros(2, 2, 2, 2, 64, 40)
    turned, keys = ops.rope(q, k, angles.cos(), angles.sin(), positions)
    ops.kv_append(keys, v, apart, slots)
    queries = ops.rope_append(q, k, v, angles.cos(), angles.sin(), positions, together, slots)
    assert_same_bits((queries, together), (turned, apart))
