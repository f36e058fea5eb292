"""Acceptance: log-probabilities captured while generating are those of the training forward, bit
for bit, over 500 random cases of model, request and schedule; over the whole vocabulary, and over
the sets that top-k and top-p kept.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from hybrid_engine.engine import HybridEngine, SamplingParams
from hybrid_engine.engine.rollout import Rollout
from hybrid_engine.models import CausalLM, DecoderSpec, LoRAConfig, RopeSpec, apply_lora
from tests.engine.rollouts import COLUMNS, run

VOCAB, CONTEXT, HEAD = 61, 350, 8
CASES, CASES_A_TEST = 500, 25


def spec_of(family: str, kv_heads: int) -> DecoderSpec:
    """Heads and widths that fill no vector and no tile."""
    common = {
        "family": family, "vocab_size": VOCAB, "hidden_size": 24, "embed_dim": 24, "num_layers": 2,
        "heads": 4, "head_dim": HEAD, "intermediate_size": 40, "max_positions": CONTEXT,
        "norm_eps": 1e-5, "attention_scale": HEAD**-0.5,
    }  # fmt: skip
    if family == "llama":
        return DecoderSpec(
            **common, kv_heads=kv_heads, norm="rms_norm", positions="rotary", activation="silu",
            gated_mlp=True, rope=RopeSpec(theta=10000.0, rotary_dim=HEAD), tied_head=kv_heads == 1,
        )  # fmt: skip
    return DecoderSpec(
        **common, kv_heads=4, norm="layer_norm", positions="learned", tied_head=True,
        position_offset=2 if family == "opt" else 0,
        activation="relu" if family == "opt" else "gelu_tanh",
        qkv_bias=True, attn_out_bias=True, mlp_bias=True,
    )  # fmt: skip


@cache
def model_of(family: str, kv_heads: int, lora: bool) -> CausalLM:
    model = CausalLM(spec_of(family, kv_heads))
    if lora:
        apply_lora(model, LoRAConfig(r=3, alpha=6.0))
    generator = torch.Generator().manual_seed(kv_heads)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = torch.randn(parameter.shape, generator=generator) * 0.4
            norm_weight = "norm" in name and name.endswith("weight")
            parameter.copy_(spread + 1.0 if norm_weight else spread)
    return model.eval()


@dataclass
class Case:
    model: CausalLM
    prompts: list[list[int]]
    params: SamplingParams
    stops: tuple[int, ...]
    options: dict[str, Any]
    threads: int


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    family, kv_heads = rng.choice(
        [("llama", 1), ("llama", 2), ("llama", 4), ("opt", 4), ("gpt2", 4)]
    )
    n = rng.choice([1, 1, 2, 4, 8])
    count = max(1, rng.choice([1, 2, 5, 16, 64]) // n)
    longest = rng.choice([4, 30, 70, 140])
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]
    tight = rng.random() < 0.3  # long responses in the smallest cache: they preempt each other
    params = SamplingParams(
        n=n,
        max_new_tokens=180 if tight else rng.choice([1, 5, 20, 70]),
        temperature=rng.choice([0.0, 0.3, 1.0, 1.0, 1.7]),
        top_k=rng.choice([0, 0, 1, 7, 1000]),
        top_p=rng.choice([1.0, 1.0, 0.9, 0.3]),
        seed=rng.randrange(2**40),
    )
    stops = tuple(rng.sample(range(VOCAB), 0 if tight else rng.choice([0, 1, 3])))
    options: dict[str, Any] = {
        "max_batch": rng.choice([1, 2, 7, 32, 64]),
        "max_prefill_rows": rng.choice([1, 13, 64, 100, 512]),
        "expected_new": [rng.random() * 70 for _ in prompts] if rng.random() < 0.5 else [],
        "sample_ids": rng.sample(range(2**40), count * n),
        "poison_freed_blocks": True,
    }
    if tight or rng.random() < 0.2:
        options["kv_bytes"] = cache_of(family, kv_heads, prompts, params) * rng.choice([1, 1, 2])
    if rng.random() < 0.2:
        options["prompt_max_new"] = [rng.randint(1, 70) for _ in prompts]
    model = model_of(family, kv_heads, rng.random() < 0.5)
    return Case(model, prompts, params, stops, options, rng.choice([1, 2]))


def cache_of(family: str, kv_heads: int, prompts: list[list[int]], params: SamplingParams) -> int:
    """Bytes in which the longest sequence fits alone: the others preempt each other."""
    tokens = max(map(len, prompts)) + params.max_new_tokens - 1
    floats_a_block = 2 * 64 * HEAD * (kv_heads if family == "llama" else 4)
    return -(-tokens // 64) * floats_a_block * 4 * 2


def generate(case: Case, **more: Any) -> Rollout:
    torch.set_num_threads(case.threads)
    return run(case.model, case.prompts, case.params, case.stops, **case.options, **more)


def rescored(
    case: Case, rollout: Rollout, thresholds: list[list[float]] | None = None
) -> list[list[float]]:
    torch.set_num_threads(3 - case.threads)
    engine = HybridEngine(case.model, None, score_tokens=1000)
    temperature = case.params.scoring_temperature
    rows = engine.token_logprobs(rollout.sequences, rollout.prompt_lengths, temperature, thresholds)
    return [row.tolist() for row in rows]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("first", range(0, CASES, CASES_A_TEST))
def test_captured_logprobs_are_those_of_training(first: int) -> None:
    for seed in range(first, first + CASES_A_TEST):
        case = random_case(seed)
        rollout = generate(case)
        assert rescored(case, rollout) == rollout.logprobs, f"case {seed}"
        if case.params.truncated:
            kept = rescored(case, rollout, rollout.thresholds)
            assert kept == rollout.kept_logprobs, f"case {seed}"
        if seed % 4 == 0:
            # The same again with each response as its own draft, and some of them damaged.
            drafts = [
                row if i % 3 else row[: len(row) // 2] + [0] for i, row in enumerate(rollout.tokens)
            ]
            again = generate(case, drafts=drafts)
            for name in COLUMNS:
                assert getattr(again, name) == getattr(rollout, name), f"case {seed}: {name}"


def test_the_cases_reach_what_they_are_for() -> None:
    cases = [random_case(seed) for seed in range(60)]
    counters = [generate(case).counters for case in cases]
    assert sum(c["preemptions"] > 0 for c in counters) >= 4
    assert sum(c["prefill_passes"] + c["decode_steps"] > c["passes"] for c in counters) >= 20
    assert sum(case.params.n > 1 for case in cases) >= 15
    assert sum(case.params.truncated for case in cases) >= 25
    assert {len(case.prompts) * case.params.n for case in cases} >= {1, 64}
