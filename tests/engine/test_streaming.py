"""``on_token``: the same tokens as the rollout, in order, on every path that generates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from hybrid_engine.engine import HybridEngine, SamplingParams
from hybrid_engine.engine.reference_generate import reference_generate
from hybrid_engine.engine.request import Request
from tests.tiny import make_tiny_model, make_tiny_tokenizer

PROMPTS = [[10, 11, 12], [13], [14, 15]]
PARAMS = SamplingParams(n=2, max_new_tokens=7, seed=3)


class Streamed(dict):
    def __call__(self, sample: int, token: int) -> None:
        self.setdefault(sample, []).append(token)

    def lists(self) -> list[list[int]]:
        return [self[sample] for sample in sorted(self)]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> HybridEngine:
    path = make_tiny_model(tmp_path_factory.mktemp("native"))
    return HybridEngine.from_pretrained(path, max_batch=3)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> HybridEngine:
    path: Path = tmp_path_factory.mktemp("foreign")
    tokenizer = make_tiny_tokenizer()
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    with pytest.warns(UserWarning, match="gpt_neox"):
        return HybridEngine.from_pretrained(path, max_batch=4)


@pytest.mark.parametrize("prompts, n", [(PROMPTS, 2), (PROMPTS[:1], 1)])
@pytest.mark.parametrize("family", ["native", "foreign"])
def test_streamed_tokens_are_the_rollout(
    family: str, prompts: list[list[int]], n: int, request: pytest.FixtureRequest
) -> None:
    engine = request.getfixturevalue(family)
    streamed = Streamed()
    params = SamplingParams(n=n, max_new_tokens=7, seed=3)
    rollout = engine.generate(prompts, params, on_token=streamed)
    assert streamed.lists() == rollout.tokens
    assert len(rollout.tokens) == n * len(prompts)


def test_reference_streams_the_same_tokens(native: HybridEngine) -> None:
    streamed, samples = Streamed(), list(range(6))
    ends = list(native.eos_token_ids)
    request = Request(PROMPTS, PARAMS, ends, samples, max_batch=2, on_token=streamed)
    result = reference_generate(native.model, request)
    assert streamed.lists() == result["tokens"]


@pytest.mark.parametrize("family", ["native", "foreign"])
@pytest.mark.parametrize("callback", ["on_token", "on_progress"])
def test_a_callers_own_value_error_is_not_the_users(
    family: str, callback: str, request: pytest.FixtureRequest
) -> None:
    """A bug in a callback must not pass for a request that cannot be served."""

    def broken(*_: int) -> None:
        raise ValueError("a bug of the caller")

    engine = request.getfixturevalue(family)
    with pytest.raises(ValueError, match="a bug of the caller") as caught:
        engine.generate(PROMPTS[:1], PARAMS, **{callback: broken})
    assert type(caught.value) is ValueError


@pytest.mark.parametrize("family", ["native", "foreign"])
def test_an_exception_ends_the_call_and_nothing_else(
    family: str, request: pytest.FixtureRequest
) -> None:
    engine = request.getfixturevalue(family)
    params = SamplingParams(max_new_tokens=7, seed=3, ignore_eos=True)
    before = engine.generate(PROMPTS[:1], params).tokens
    seen: list[int] = []

    def on_token(sample: int, token: int) -> None:
        seen.append(token)
        if len(seen) == 3:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        engine.generate(PROMPTS[:1], params, on_token=on_token)
    assert seen == before[0][:3]
    assert engine.generate(PROMPTS[:1], params).tokens == before
