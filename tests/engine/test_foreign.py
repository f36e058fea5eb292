"""A family without a native decoder: transformers generates, the training forward scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from hybrid_engine.engine import HybridEngine, SamplingParams
from hybrid_engine.models import pack
from tests.engine.rollouts import random_prompts
from tests.tiny import make_tiny_tokenizer

PROMPTS = random_prompts(5, longest=20)


@pytest.fixture(scope="module")
def neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its generation config would change what is sampled, were it heard."""
    directory, tokenizer = tmp_path_factory.mktemp("neox"), make_tiny_tokenizer()
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=128, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.dim() == 2 else 1.0)
    model.generation_config.repetition_penalty = 3.0
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def engine(neox: Path) -> HybridEngine:
    with pytest.warns(UserWarning, match="no native decoder for model type 'gpt_neox'"):
        return HybridEngine.from_pretrained(neox, max_batch=4)


def exact_logprobs(
    neox: Path, sequence: list[int], prompt: int, temperature: float
) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(neox, dtype=torch.float64)
    logits = model(torch.tensor([sequence])).logits[0, prompt - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(sequence[prompt:])[:, None])[:, 0]


def test_logprobs_are_those_of_the_plain_model(engine: HybridEngine, neox: Path) -> None:
    rollout = engine.generate(PROMPTS, SamplingParams(n=2, max_new_tokens=12, temperature=0.8))
    assert len(rollout) == 10
    assert "length" in rollout.finish_reasons
    for i, sequence in enumerate(rollout.sequences):
        exact = exact_logprobs(neox, sequence, rollout.prompt_lengths[i], 0.8)
        torch.testing.assert_close(
            torch.tensor(rollout.logprobs[i]).double(), exact, rtol=1e-4, atol=1e-4
        )
    assert all(mass == 1.0 for row in rollout.kept_mass for mass in row)


def test_greedy_tokens_are_the_most_likely_ones(engine: HybridEngine, neox: Path) -> None:
    rollout = engine.generate(
        PROMPTS, SamplingParams(max_new_tokens=10, temperature=0.0, ignore_eos=True)
    )
    model = AutoModelForCausalLM.from_pretrained(neox, dtype=torch.float32)
    for sequence, prompt in zip(rollout.sequences, rollout.prompt_lengths):
        best = model(torch.tensor([sequence])).logits[0, prompt - 1 : -1].argmax(-1)
        assert best.tolist() == sequence[prompt:]


def test_kept_mass_of_truncated_sampling(engine: HybridEngine) -> None:
    params = SamplingParams(n=3, max_new_tokens=8, top_k=5, ignore_eos=True)
    rollout = engine.generate(PROMPTS, params)
    for i, sequence in enumerate(rollout.sequences):
        logits = engine.model.logits(pack([sequence]))[rollout.prompt_lengths[i] - 1 : -1]
        expected = logits.softmax(-1).topk(5).values.sum(-1)
        torch.testing.assert_close(
            torch.tensor(rollout.kept_mass[i]), expected, rtol=1e-3, atol=1e-4
        )


def test_thresholds_part_the_kept_from_the_others(engine: HybridEngine) -> None:
    params = SamplingParams(n=2, max_new_tokens=6, temperature=0.8, top_k=5, ignore_eos=True)
    rollout = engine.generate(PROMPTS, params)
    for i, sequence in enumerate(rollout.sequences):
        logits = engine.model.logits(pack([sequence]))[rollout.prompt_lengths[i] - 1 : -1]
        kept = logits >= torch.tensor(rollout.thresholds[i]).unsqueeze(1)
        assert kept.sum(1).tolist() == [5] * len(kept)
        log_p = (logits / 0.8).masked_fill(~kept, -torch.inf).log_softmax(-1)
        drawn = log_p.gather(1, torch.tensor(rollout.tokens[i]).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(rollout.kept_logprobs[i]), drawn)


def test_a_stop_token_is_kept_and_ends_the_response(engine: HybridEngine) -> None:
    params = SamplingParams(max_new_tokens=30, stop_token_ids=tuple(range(0, 260, 5)))
    rollout = engine.generate(PROMPTS, params)
    stops = {*params.stop_token_ids, 257}
    for tokens, reason in zip(rollout.tokens, rollout.finish_reasons):
        assert not stops & set(tokens[:-1])
        assert (reason == "stop") == (tokens[-1] in stops)
    assert "stop" in rollout.finish_reasons


def test_the_same_seed_gives_the_same_samples(engine: HybridEngine) -> None:
    first, again, other = (
        engine.generate(PROMPTS, SamplingParams(max_new_tokens=8, seed=seed)).tokens
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_lone_sample_streams(engine: HybridEngine) -> None:
    streamed: list[int] = []
    rollout = engine.generate(
        PROMPTS[:1],
        SamplingParams(max_new_tokens=8),
        on_token=lambda _, token: streamed.append(token),
    )
    assert streamed == rollout.tokens[0]
