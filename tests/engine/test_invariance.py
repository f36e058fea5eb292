"""A sample depends on its prompt, its id and the seed: on nothing else in the call, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybrid_engine.engine.rollout import Rollout
from hybrid_engine.engine.sampling import SamplingParams
from hybrid_engine.models import CausalLM, load_causal_lm
from tests.engine.rollouts import COLUMNS, assert_same, random_prompts, run
from tests.tiny import make_tiny_tokenizer, tiny_config

PROMPTS = random_prompts(12)
STOPS = tuple(range(0, 260, 25))  # about one token in 25 ends a response: ragged lengths, refills


@pytest.fixture
def usual(model: CausalLM) -> Rollout:
    return run(model, PROMPTS, SamplingParams(max_new_tokens=40), STOPS, max_batch=16)


@pytest.mark.parametrize("max_batch", [1, 3])
def test_batch_size(model: CausalLM, usual: Rollout, max_batch: int) -> None:
    assert len(set(map(len, usual.tokens))) > 3  # the lengths are ragged: slots are refilled
    assert_same(
        run(model, PROMPTS, SamplingParams(max_new_tokens=40), STOPS, max_batch=max_batch), usual
    )


@pytest.mark.parametrize("max_prefill_rows", [1, 17, 64, 100])
def test_chunked_prefill(model: CausalLM, usual: Rollout, max_prefill_rows: int) -> None:
    params = SamplingParams(max_new_tokens=40)
    assert_same(
        run(model, PROMPTS, params, STOPS, max_batch=5, max_prefill_rows=max_prefill_rows), usual
    )


def test_order_of_the_queue(model: CausalLM, usual: Rollout) -> None:
    order = random.Random(1).sample(range(len(PROMPTS)), len(PROMPTS))
    shuffled = run(
        model,
        [PROMPTS[i] for i in order],
        SamplingParams(max_new_tokens=40),
        STOPS,
        sample_ids=order,
        max_batch=4,
    )
    for name in COLUMNS:
        assert getattr(shuffled, name) == [getattr(usual, name)[i] for i in order], name


def test_expected_lengths_change_the_order_only(model: CausalLM, usual: Rollout) -> None:
    expected = [float(len(tokens)) for tokens in usual.tokens]
    params = SamplingParams(max_new_tokens=40)
    longest_first = run(model, PROMPTS, params, STOPS, max_batch=4, expected_new=expected)
    assert_same(longest_first, usual)


def test_a_small_cache(model: CausalLM, usual: Rollout) -> None:
    params = SamplingParams(max_new_tokens=40)
    block = usual.counters["block_bytes"]
    tight = run(
        model, PROMPTS, params, STOPS, max_batch=16, kv_bytes=5 * block, poison_freed_blocks=True
    )
    assert_same(tight, usual)
    assert tight.counters["peak_blocks"] <= 5 < usual.counters["peak_blocks"]


def test_poisoned_blocks_are_never_read(model: CausalLM, usual: Rollout) -> None:
    params = SamplingParams(max_new_tokens=40)
    assert_same(run(model, PROMPTS, params, STOPS, max_batch=4, poison_freed_blocks=True), usual)


@pytest.mark.parametrize("max_batch", [2, 64])
def test_forked_samples_equal_separate_prompts(model: CausalLM, max_batch: int) -> None:
    prompts = PROMPTS[:5]
    forked = run(
        model,
        prompts,
        SamplingParams(n=4, max_new_tokens=30),
        STOPS,
        max_batch=max_batch,
        poison_freed_blocks=True,
    )
    repeated = run(
        model, [p for p in prompts for _ in range(4)], SamplingParams(max_new_tokens=30), STOPS
    )
    for name in ("tokens", "logprobs", "entropies"):
        assert getattr(forked, name) == getattr(repeated, name)
    assert forked.counters["prefill_tokens"] * 4 == repeated.counters["prefill_tokens"]


def test_thread_count(model: CausalLM, one_thread: None) -> None:
    params = SamplingParams(n=2, max_new_tokens=20)
    alone = run(model, PROMPTS, params, STOPS)
    torch.set_num_threads(2)
    assert_same(run(model, PROMPTS, params, STOPS), alone)


def test_truncated_sampling(llama: CausalLM) -> None:
    params = SamplingParams(max_new_tokens=20, temperature=0.7, top_k=20, top_p=0.8)
    together = run(llama, PROMPTS, params, STOPS, max_batch=16)
    assert_same(run(llama, PROMPTS, params, STOPS, max_batch=1), together)
    kept = torch.tensor([mass for row in together.kept_mass for mass in row])
    assert (kept > 0).all()
    assert (kept <= 1).all()
    assert (kept < 1).any()


def test_seed_and_sample_id_choose_the_stream(llama: CausalLM) -> None:
    params = SamplingParams(max_new_tokens=20)
    first = run(llama, [PROMPTS[3]] * 2, params)
    assert first.tokens[0] != first.tokens[1]  # ids 0 and 1
    assert run(llama, [PROMPTS[3]] * 2, params, sample_ids=[7, 0]).tokens[1] == first.tokens[0]
    assert (
        run(llama, [PROMPTS[3]], SamplingParams(max_new_tokens=20, seed=1)).tokens[0]
        != first.tokens[0]
    )


def scratch_bytes(directory: Path, vocab: int, params: SamplingParams) -> int:
    """Of a rollout of 32 samples by a tiny model with a vocabulary of its own."""
    config = tiny_config("llama", make_tiny_tokenizer())
    config.vocab_size = vocab
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    rollout = run(load_causal_lm(directory), [[7, 8, 9]] * 32, params, max_batch=32)
    return rollout.counters["scratch_bytes"]


@pytest.mark.parametrize("top_k", [0, 20])
def test_a_rollout_holds_no_logits(tmp_path: Path, top_k: int) -> None:
    """Every 64 tokens more are four numbers more a row, and of the highest blocks are 16 MiB
    kept whatever the vocabulary, which both of these exceed.
    """
    params = SamplingParams(max_new_tokens=5, top_k=top_k)
    small, large = (scratch_bytes(tmp_path / f"{v}", v, params) for v in (140_000, 180_000))
    assert 0 < large - small < 32 * 40_000 * 4 / 12
