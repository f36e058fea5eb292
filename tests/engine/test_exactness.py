"""What generation captured, against the training forward and against other generators."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybrid_engine.engine import HybridEngine, SamplingParams
from hybrid_engine.engine.reference_generate import reference_generate
from hybrid_engine.engine.request import Request
from hybrid_engine.engine.rollout import Rollout
from hybrid_engine.models import CausalLM
from tests.engine.rollouts import random_prompts, run

PROMPTS = random_prompts(8)
STOPS = tuple(range(0, 260, 25))


def flat(values: list[list[float]] | list[Tensor]) -> Tensor:
    return torch.cat([torch.as_tensor(row) for row in values])


def rescored(
    model: CausalLM,
    rollout: Rollout,
    temperature: float,
    thresholds: list[list[float]] | None = None,
) -> Tensor:
    """The training forward's log-probabilities, in passes unlike those of generation."""
    engine = HybridEngine(model, None, score_tokens=200)
    sequences, lengths = rollout.sequences, rollout.prompt_lengths
    return flat(engine.token_logprobs(sequences, lengths, temperature, thresholds))


@pytest.mark.parametrize("max_batch", [1, 16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_captured_logprobs_are_those_of_training(
    model: CausalLM, max_batch: int, temperature: float
) -> None:
    params = SamplingParams(n=2, max_new_tokens=40, temperature=temperature)
    rollout = run(model, PROMPTS, params, STOPS, max_batch=max_batch, max_prefill_rows=50)
    assert torch.equal(flat(rollout.logprobs), rescored(model, rollout, temperature))


def test_captured_logprobs_with_adapters(lora_model: CausalLM) -> None:
    rollout = run(lora_model, PROMPTS, SamplingParams(max_new_tokens=40), STOPS)
    again = rescored(lora_model, rollout, 1.0)
    assert torch.equal(flat(rollout.logprobs), again)
    for name, parameter in lora_model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.zero_()
    assert (
        rescored(lora_model, rollout, 1.0) - again
    ).abs().max() > 1e-3  # the adapters did something


def test_greedy_logprobs_are_at_temperature_one(llama: CausalLM) -> None:
    rollout = run(llama, PROMPTS, SamplingParams(max_new_tokens=20, temperature=0.0))
    assert torch.equal(flat(rollout.logprobs), rescored(llama, rollout, 1.0))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 1, 1.0), (0.7, 20, 1.0), (1.4, 0, 0.9), (1.0, 60, 0.8)],
)
def test_training_replays_truncated_sampling(
    model: CausalLM, temperature: float, top_k: int, top_p: float
) -> None:
    """The threshold alone gives the kept set and its log-probabilities back, bit for bit."""
    params = SamplingParams(
        n=2, max_new_tokens=30, temperature=temperature, top_k=top_k, top_p=top_p
    )
    rollout = run(model, PROMPTS, params, STOPS, max_batch=6, max_prefill_rows=50)
    kept, whole = flat(rollout.kept_logprobs), flat(rollout.logprobs)
    assert torch.equal(whole, rescored(model, rollout, temperature))
    assert torch.equal(kept, rescored(model, rollout, temperature, rollout.thresholds))
    expected = whole.double() - flat(rollout.kept_mass).double().log()
    torch.testing.assert_close(kept.double(), expected, rtol=0, atol=4e-6)
    assert (kept > whole).any()


def test_without_truncation_the_kept_set_is_everything(llama: CausalLM) -> None:
    for temperature in (0.0, 1.0):
        rollout = run(llama, PROMPTS, SamplingParams(max_new_tokens=9, temperature=temperature))
        assert rollout.kept_logprobs == rollout.logprobs
        assert flat(rollout.thresholds).eq(-torch.inf).all()


def test_entropies_are_those_of_training(llama: CausalLM) -> None:
    rollout = run(llama, PROMPTS, SamplingParams(max_new_tokens=20, temperature=0.8))
    engine = HybridEngine(llama, None)
    _, entropies = engine._score(rollout.sequences, rollout.prompt_lengths, 0.8)
    assert torch.equal(flat(rollout.entropies), flat(entropies))


@pytest.mark.parametrize("params", [
    SamplingParams(max_new_tokens=25, temperature=0.0),
    SamplingParams(n=2, max_new_tokens=25),
    SamplingParams(max_new_tokens=25, temperature=0.7, top_k=30, top_p=0.9),
], ids=["greedy", "plain", "truncated"])  # fmt: skip
def test_same_tokens_as_recomputing_every_sequence(model: CausalLM, params: SamplingParams) -> None:
    native = run(model, PROMPTS, params, STOPS, max_batch=5)
    ids = list(range(len(PROMPTS) * params.n))
    request = Request(PROMPTS, params, list(STOPS), ids, max_batch=3)
    slow = Rollout(prompts=PROMPTS, n=params.n, **reference_generate(model, request))
    assert slow.tokens == native.tokens
    assert slow.finish_reasons == native.finish_reasons
    assert slow.logprobs == native.logprobs
    for name in ("entropies", "kept_mass", "thresholds", "kept_logprobs"):
        assert getattr(slow, name) == getattr(native, name), name


def greedy_by_transformers(hf_model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    output = hf_model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=count,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


def test_greedy_tokens_are_those_of_transformers(
    family: str, tiny_directories: dict[str, Path]
) -> None:
    from transformers import AutoModelForCausalLM

    directory = tiny_directories[family]
    engine = HybridEngine.from_pretrained(directory)
    hf_model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    params = SamplingParams(max_new_tokens=30, temperature=0.0, ignore_eos=True)
    rollout = engine.generate(PROMPTS[:5], params)
    expected = [greedy_by_transformers(hf_model, prompt, 30) for prompt in PROMPTS[:5]]
    assert rollout.tokens == expected


@pytest.mark.real_model
def test_greedy_tokens_of_smollm2_are_those_of_transformers(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM

    engine = HybridEngine.from_pretrained(smollm2)
    texts = ["The film was", "Write one sentence about the sea.", "def add(a, b):"]
    prompts = [engine.tokenizer(text)["input_ids"] for text in texts]
    params = SamplingParams(max_new_tokens=64, temperature=0.0, ignore_eos=True)
    hf_model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    rollout = engine.generate(prompts, params)
    assert rollout.tokens == [greedy_by_transformers(hf_model, prompt, 64) for prompt in prompts]
    again = flat(engine.token_logprobs(rollout.sequences, rollout.prompt_lengths))
    assert torch.equal(flat(rollout.logprobs), again)
