"""bfloat16 weights generate and score what the same weights in float32 do, bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from hybrid_engine.config import OptimizerConfig
from hybrid_engine.engine import HybridEngine, SamplingParams, TrainEngine
from hybrid_engine.models import CausalLM, load_causal_lm, pack, response_rows
from tests.engine.rollouts import assert_same, random_prompts, run
from tests.engine.test_exactness import flat, rescored

PROMPTS = random_prompts(6)


def pair(model: CausalLM) -> tuple[CausalLM, CausalLM]:
    """The model in bfloat16, and those very weights in float32."""
    halves = copy.deepcopy(model).to(torch.bfloat16)
    return halves, copy.deepcopy(halves).float()


@pytest.mark.parametrize("max_batch", [1, 4, 12])
def test_generates_what_the_widened_weights_do(model: CausalLM, max_batch: int) -> None:
    halves, floats = pair(model)
    params = SamplingParams(n=2, max_new_tokens=20)
    ours, theirs = (run(m, PROMPTS, params, max_batch=max_batch) for m in (halves, floats))
    assert_same(ours, theirs)


def test_adapters_are_widened_too(lora_model: CausalLM) -> None:
    halves, floats = pair(lora_model)
    params = SamplingParams(max_new_tokens=20)
    assert_same(run(halves, PROMPTS, params), run(floats, PROMPTS, params))


def test_captured_logprobs_are_those_of_the_scoring_forward(model: CausalLM) -> None:
    halves, floats = pair(model)
    rollout = run(halves, PROMPTS, SamplingParams(n=2, max_new_tokens=20, temperature=0.8))
    again = rescored(halves, rollout, 0.8)
    assert torch.equal(flat(rollout.logprobs), again)
    assert torch.equal(again, rescored(floats, rollout, 0.8))


def test_captured_logprobs_with_adapters(lora_model: CausalLM) -> None:
    halves, _ = pair(lora_model)
    rollout = run(halves, PROMPTS, SamplingParams(max_new_tokens=20))
    assert torch.equal(flat(rollout.logprobs), rescored(halves, rollout, 1.0))


def test_a_training_step_reaches_the_next_rollout(tiny_directories: dict[str, Path]) -> None:
    model = load_causal_lm(tiny_directories["llama"], "bfloat16")
    config = OptimizerConfig(learning_rate=0.05, schedule="constant", warmup_ratio=0.0)
    engine = HybridEngine(model, None, TrainEngine(model, config, 1, {}))
    params = SamplingParams(max_new_tokens=12)
    before = engine.generate(PROMPTS, params)
    batch = pack(before.sequences)
    rows, targets = response_rows(batch, before.prompt_lengths)
    logprobs = engine.train_engine(batch, rows, targets).logprobs
    assert torch.equal(logprobs.detach(), flat(before.logprobs))
    with engine.training():
        engine.train_engine.backward(-logprobs.sum(), len(logprobs))
        engine.train_engine.step()
    after = engine.generate(PROMPTS, params)
    again = flat(engine.token_logprobs(after.sequences, after.prompt_lengths))
    assert torch.equal(flat(after.logprobs), again)
    moved = engine.token_logprobs(before.sequences, before.prompt_lengths)
    assert not torch.equal(flat(moved), logprobs)


def test_gradients_are_those_of_the_widened_weights_rounded_once(model: CausalLM) -> None:
    """All but the embeddings', whose rows torch sums in bfloat16 where a token comes twice."""
    halves, floats = pair(model)
    batch = pack(PROMPTS)
    rows, targets = response_rows(batch, [1] * len(PROMPTS))
    for m in (halves, floats):
        m(batch, rows, targets).logprobs.sum().backward()
    expected = dict(floats.named_parameters())
    for name, parameter in halves.named_parameters():
        if "embed" not in name:
            assert torch.equal(parameter.grad, expected[name].grad.bfloat16()), name
