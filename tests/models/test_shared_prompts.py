"""Sequences that begin with one prompt: its rows are computed once, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_engine.models import (
    PackedBatch,
    compute_trunk,
    last_rows,
    load_causal_lm,
    load_scalar_model,
    pack,
    response_rows,
    unpack,
)

from .peers import ONE_OF_EACH_FAMILY, grouped, save_causal

TOKENS = st.lists(st.integers(0, 2), max_size=3)


@given(st.lists(st.tuples(TOKENS, TOKENS), max_size=6))
def test_places_and_rows_are_two_views_of_the_same_sequences(
    parts: list[tuple[list[int], list[int]]],
) -> None:
    sequences = [prompt + answer for prompt, answer in parts]
    batch = pack(sequences, [len(prompt) for prompt, _ in parts])
    assert [part.tolist() for part in unpack(batch.input_ids, batch)] == sequences
    assert batch.at_places(batch.positions).tolist() == [
        i for s in sequences for i in range(len(s))
    ]
    assert torch.equal(batch.at_rows(batch.at_places(batch.input_ids)), batch.input_ids)
    prompts = {tuple(prompt) for prompt, _ in parts}
    assert batch.num_tokens == sum(map(len, prompts)) + sum(len(answer) for _, answer in parts)


def test_without_a_common_prompt_nothing_is_rearranged() -> None:
    batch = pack([[1, 2, 3], [1, 3, 3]], [2, 2])
    assert batch.row_of is None
    assert batch.place_of is None


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3)), min_size=1, max_size=5))
def test_rows_precede_their_targets_in_every_sequence(shapes: list[tuple[int, int]]) -> None:
    prompts = ([7, 8], [9])
    answers = [[100 * i + j for j in range(length)] for i, (_, length) in enumerate(shapes)]
    sequences = [prompts[which] + answers[i] for i, (which, _) in enumerate(shapes)]
    lengths = [len(prompts[which]) for which, _ in shapes]
    batch = pack(sequences, lengths)
    rows, targets = response_rows(batch, lengths)
    assert targets.tolist() == [token for answer in answers for token in answer]
    before = [t for s, p in zip(sequences, lengths, strict=True) for t in s[p - 1 : -1]]
    assert batch.input_ids[rows].tolist() == before
    assert batch.input_ids[last_rows(batch)].tolist() == [s[-1] for s in sequences]


def both(sequences: list[list[int]], prompts: list[int]) -> tuple[PackedBatch, PackedBatch]:
    shared, apart = pack(sequences, prompts), pack(sequences)
    assert shared.num_tokens < apart.num_tokens
    return shared, apart


@pytest.mark.parametrize("layout", [*ONE_OF_EACH_FAMILY, "mistral-window"])
def test_scores_have_the_same_bits(layout: str, tmp_path: Path) -> None:
    save_causal(layout, tmp_path)
    policy = load_causal_lm(tmp_path, trainable_layers=1)
    value = load_scalar_model(tmp_path)
    sequences, prompts = grouped()
    results = []
    with torch.no_grad():
        for batch in both(sequences, prompts):
            rows, targets = response_rows(batch, prompts)
            trunk = compute_trunk(policy, batch, 1)
            results.append(
                [
                    *policy(batch, rows, targets),
                    *policy(batch, rows, targets, trunk=trunk),
                    value(batch, rows),
                    value(batch, last_rows(batch)),
                    torch.cat(unpack(trunk.hidden, batch)),
                ]
            )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("layout", ONE_OF_EACH_FAMILY)
def test_gradients_are_equal_up_to_rounding(layout: str, tmp_path: Path) -> None:
    """A prompt's gradient is the sum over its answers, before or after the matrix products."""
    save_causal(layout, tmp_path)
    sequences, prompts = grouped()
    grads = []
    for batch in both(sequences, prompts):
        model = load_causal_lm(tmp_path)
        rows, targets = response_rows(batch, prompts)
        scores = model(batch, rows, targets)
        weights = torch.linspace(-1, 1, len(targets))
        (scores.logprobs * weights).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    shared, apart = grads
    for name, grad in apart.items():
        scale = float(grad.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(
            shared[name], grad, rtol=0, atol=1e-5 * scale, msg=lambda text, n=name: f"{n}: {text}"
        )
