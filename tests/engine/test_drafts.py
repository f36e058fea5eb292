"""Drafts change the work, never the result: not a token, not a bit of a log-probability."""

from __future__ import annotations

import random

import pytest
import torch

from hybrid_engine.engine import HybridEngine, SamplingParams
from hybrid_engine.engine.reference_generate import reference_generate
from hybrid_engine.engine.request import Request
from hybrid_engine.engine.rollout import Rollout
from hybrid_engine.errors import UserError
from hybrid_engine.models import CausalLM
from tests.engine.rollouts import assert_same, random_prompts, run

PROMPTS = random_prompts(7)
STOPS = tuple(range(0, 260, 50))
PARAMS = SamplingParams(n=2, max_new_tokens=70)


@pytest.fixture
def usual(model: CausalLM) -> Rollout:
    return run(model, PROMPTS, PARAMS, STOPS)


def damaged(responses: list[list[int]], seed: int) -> list[list[int]]:
    """The responses with a wrong token somewhere, cut short, too long, empty, or as they are."""
    rng = random.Random(seed)

    def damage(tokens: list[int]) -> list[int]:
        at = rng.randrange(len(tokens))
        wrong = [*tokens[:at], (tokens[at] + 1) % 256, *tokens[at + 1 :]]
        return rng.choice([wrong, tokens[:at], tokens + tokens, [], tokens])

    return [damage(tokens) for tokens in responses]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_prefill_rows", [9, 512])
def test_any_draft_gives_the_response_without(
    model: CausalLM, usual: Rollout, seed: int, max_prefill_rows: int
) -> None:
    drafted = run(
        model, PROMPTS, PARAMS, STOPS, drafts=damaged(usual.tokens, seed),
        max_batch=5, max_prefill_rows=max_prefill_rows, poison_freed_blocks=True,
    )  # fmt: skip
    assert_same(drafted, usual)
    assert drafted.counters["draft_accepted"] > 0


def test_drafts_in_a_small_cache(model: CausalLM, usual: Rollout) -> None:
    block = usual.counters["block_bytes"]
    drafted = run(
        model, PROMPTS, PARAMS, STOPS, drafts=damaged(usual.tokens, 1),
        kv_bytes=5 * block, poison_freed_blocks=True,
    )  # fmt: skip
    assert_same(drafted, usual)


def test_a_draft_that_holds_is_one_prefill(llama: CausalLM) -> None:
    usual = run(llama, PROMPTS, PARAMS, STOPS)
    again = run(llama, PROMPTS, PARAMS, STOPS, drafts=usual.tokens)
    assert_same(again, usual)
    tokens = sum(map(len, usual.tokens))
    assert again.counters["draft_accepted"] == tokens
    rows = again.counters["decode_tokens"] + again.counters["draft_tokens"]
    assert rows == tokens - len(usual)  # each token but the last is a row, once
    assert again.counters["passes"] * 5 < usual.counters["passes"]


def test_under_other_weights_the_result_is_theirs(llama: CausalLM) -> None:
    old = run(llama, PROMPTS, PARAMS, STOPS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in llama.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * parameter.std() * 0.002)
    new = run(llama, PROMPTS, PARAMS, STOPS)
    drafted = run(llama, PROMPTS, PARAMS, STOPS, drafts=old.tokens)
    assert_same(drafted, new)
    assert new.tokens != old.tokens
    tokens = sum(map(len, new.tokens))
    assert tokens * 0.3 < drafted.counters["draft_accepted"] < tokens


def test_a_draft_longer_than_the_limit(llama: CausalLM) -> None:
    usual = run(llama, PROMPTS, PARAMS)
    short = SamplingParams(n=2, max_new_tokens=20)
    cut = run(llama, PROMPTS, short, drafts=usual.tokens)
    assert_same(cut, run(llama, PROMPTS, short))
    assert cut.counters["draft_accepted"] == 20 * len(usual)


def test_greedy_and_truncated_sampling_take_drafts(llama: CausalLM) -> None:
    for rule in ({"temperature": 0.0}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9}):
        params = SamplingParams(max_new_tokens=30, **rule)  # type: ignore[arg-type]
        usual = run(llama, PROMPTS, params, STOPS)
        assert_same(run(llama, PROMPTS, params, STOPS, drafts=damaged(usual.tokens, 2)), usual)


def test_the_engine_hands_drafts_on(llama: CausalLM) -> None:
    engine = HybridEngine(llama, None)
    usual = engine.generate(PROMPTS, PARAMS)
    streamed: dict[int, list[int]] = {}
    again = engine.generate(
        PROMPTS,
        PARAMS,
        drafts=usual.tokens,
        on_token=lambda sample, token: streamed.setdefault(sample, []).append(token),
    )
    assert again.tokens == usual.tokens == [streamed[i] for i in range(len(usual))]
    assert again.counters["draft_accepted"] > 0


def test_the_plain_generator_gives_the_same_without_reading_them(llama: CausalLM) -> None:
    usual = run(llama, PROMPTS, PARAMS, STOPS)
    ids = list(range(len(usual)))
    request = Request(PROMPTS, PARAMS, list(STOPS), ids, drafts=damaged(usual.tokens, 0))
    assert reference_generate(llama, request)["tokens"] == usual.tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafts": [[1]]}, r"drafts has 1 entries; give one a sample \(2\), or none"),
        ({"drafts": [[1], [999]]}, "draft 1 has token id 999, outside the vocabulary of 260"),
        ({"max_new_tokens": [1, 2]}, r"max_new_tokens has 2 entries; give one a prompt \(1\)"),
        ({"max_new_tokens": [0]}, "max_new_tokens has 0; a response needs at least one token"),
        ({"expected_lengths": [1.0, 2.0]}, "expected_lengths has 2 entries; give one a prompt"),
    ],
)
def test_wrong_options_are_errors_of_the_user(llama: CausalLM, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        HybridEngine(llama, None).generate([[1]], SamplingParams(n=2), **options)
