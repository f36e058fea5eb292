"""`HybridEngine.generate` against transformers and llama.cpp: tokens a second, and the limit.

``pytest benchmarks/bench_generate.py --benchmark-only``. HYBRID_ENGINE_SMOLLM2 names the model's
directory (else the demo model is made), HYBRID_BENCH_ROUNDS the rounds. llama.cpp takes part where
`llama-cpp-python` and `gguf` are installed.

A phase is measured from outside, the same way for everybody: prefill is a call for one token,
decode what the whole call takes beyond that.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.contest import Contender, Outcome, contest
from benchmarks.models import FLOAT, TINY_VOCAB, Cost, make_tiny, smollm2
from benchmarks.peers.hf_generate import HFGenerator
from benchmarks.workload import heavy_tailed_lengths, random_prompts
from hybrid_engine.engine import HybridEngine, SamplingParams
from hybrid_engine.models import load_causal_lm
from hybrid_kernels.bench import machine_limits

PROMPT, NEW = 64, 64
HAS_LLAMA_CPP = all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))
LLAMA_CPP_MISSING = "llama.cpp is not installed: pip install llama-cpp-python gguf"


@cache
def engine(directory: Path, dtype: str = "float32") -> HybridEngine:
    return HybridEngine(load_causal_lm(directory, dtype), tokenizer=None)


@cache
def transformers(directory: Path) -> HFGenerator:
    return HFGenerator(directory)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    from benchmarks.peers.gguf_file import write_gguf

    directory = tmp_path_factory.mktemp("gguf")
    return cache(lambda dtype: write_gguf(smollm2(), directory / f"{dtype}.gguf", dtype))


@cache
def llama_cpp(file: Path) -> Any:
    from benchmarks.peers.llama_cpp import LlamaCpp

    return LlamaCpp(file)


def phased(generate: Callable[[int], Any], batch: int, new_tokens: int) -> Contender:
    """A contender from `generate`, which makes so many tokens to each of `batch` prompts."""

    def run() -> Outcome:
        start = time.perf_counter()
        generate(1)
        prefill = time.perf_counter() - start
        start = time.perf_counter()
        answers = generate(new_tokens)
        whole = time.perf_counter() - start
        assert len(answers) == batch
        assert {len(answer) for answer in answers} == {new_tokens}
        phases = {"prefill": prefill, "decode": whole - prefill, "whole": whole}
        return Outcome(batch * new_tokens, phases)

    return run


def decode_limit(cost: Cost, batch: int, length: float, weight_bytes: int = FLOAT) -> float:
    """Tokens a second if each step read weights and KV cache once, at the measured rate, or did its
    products at the rate of torch's sgemm, whichever takes longer.
    """
    limits = machine_limits()
    step_bytes = weight_bytes * cost.weights + batch * length * cost.kv_bytes_per_token
    by_reading = batch * limits.read_gb_per_s * 1e9 / step_bytes
    return min(by_reading, limits.gflop_per_s * 1e9 / (2 * cost.weights))


def work(cost: Cost, batch: int, weight_bytes: int = FLOAT) -> dict[str, Any]:
    """What `PROMPT` + `NEW` tokens in a batch cost, and the limit of decoding them."""
    length = PROMPT + NEW / 2
    steps = (NEW - 1) * (weight_bytes * cost.weights + batch * length * cost.kv_bytes_per_token)
    return {
        "kind": "generate",
        "batch": batch,
        "prompt_tokens": batch * PROMPT,
        "new_tokens": batch * NEW,
        "decode_bytes": steps,
        "flops": cost.generate_flops([PROMPT] * batch, [NEW] * batch),
        "prefill_flops": cost.forward_flops([PROMPT] * batch, batch),
        "limit_tokens_per_second": decode_limit(cost, batch, length, weight_bytes),
    }


def ours(directory: Path, prompts: list[list[int]], dtype: str = "float32") -> Callable[[int], Any]:
    def generate(new_tokens: int) -> list[list[int]]:
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        return engine(directory, dtype).generate(prompts, params).tokens

    return generate


def transformers_contender(directory: Path, prompts: list[list[int]]) -> dict[str, Contender]:
    """transformers with the better of its caches."""
    peer = transformers(directory)
    kind = peer.better_cache(prompts, NEW)

    def generate(new_tokens: int) -> list[list[int]]:
        return peer.generate(prompts, new_tokens, cache=kind)

    return {f"transformers ({kind} cache)": phased(generate, len(prompts), NEW)}


def llama_cpp_contender(file: Path, prompts: list[list[int]], dtype: str) -> dict[str, Contender]:
    peer = llama_cpp(file)
    peer.generate(prompts[:1], 2)
    run = phased(lambda new_tokens: peer.generate(prompts, new_tokens), len(prompts), NEW)
    return {f"llama.cpp ({dtype.upper()})": run}


@pytest.mark.parametrize("batch", [1, 8, 32, 64])
def bench_generate(benchmark: Any, batch: int, request: pytest.FixtureRequest) -> None:
    """SmolLM2-135M, fp32, temperature 1."""
    model = smollm2()
    cost = Cost.of(model)
    prompts = random_prompts(batch, PROMPT, 40000)
    generate = ours(model, prompts)
    assert_equal_greedy(model, prompts[:4], transformers(model))
    generate(2)
    rivals = transformers_contender(model, prompts)
    if HAS_LLAMA_CPP:
        file = request.getfixturevalue("gguf")("f32")
        assert_equal_greedy(model, prompts[:4], llama_cpp(file))
        rivals |= llama_cpp_contender(file, prompts, "f32")
    contest(benchmark, phased(generate, batch, NEW), rivals, info=work(cost, batch))


def assert_equal_greedy(directory: Path, prompts: list[list[int]], peer: Any) -> None:
    """The engines compute the same function: they agree on the likeliest tokens."""
    params = SamplingParams(max_new_tokens=8, temperature=0.0, ignore_eos=True)
    expected = peer.generate(prompts, 8, greedy=True)
    assert engine(directory).generate(prompts, params).tokens == expected


@pytest.mark.parametrize("batch", [1, 8, 32, 64])
def bench_generate_tiny(benchmark: Any, batch: int, tiny: Path) -> None:
    """A model of 10 million parameters, where transformers spends its time dispatching."""
    prompts = random_prompts(batch, PROMPT, TINY_VOCAB)
    generate = ours(tiny, prompts)
    assert_equal_greedy(tiny, prompts[:4], transformers(tiny))
    generate(2)
    rivals = transformers_contender(tiny, prompts)
    info = work(Cost.of(tiny), batch)
    contest(benchmark, phased(generate, batch, NEW), rivals, info=info, rounds=5)


@pytest.mark.skipif(not HAS_LLAMA_CPP, reason=LLAMA_CPP_MISSING)
@pytest.mark.parametrize("batch", [1, 8, 32, 64])
def bench_generate_bf16(benchmark: Any, batch: int, gguf: Callable[[str], Path]) -> None:
    """Weights of two bytes: ours bf16, llama.cpp's F16."""
    model = smollm2()
    prompts = random_prompts(batch, PROMPT, 40000)
    generate = ours(model, prompts, "bfloat16")
    generate(2)
    rivals = llama_cpp_contender(gguf("f16"), prompts, "f16")
    info = work(Cost.of(model), batch, weight_bytes=2)
    contest(benchmark, phased(generate, batch, NEW), rivals, info=info)


def bench_generate_skewed(benchmark: Any) -> None:
    """64 prompts whose answers end at heavy-tailed lengths (mean 64, at most 256), 32 at once.

    transformers decodes two batches sorted by an oracle. We are told no length beforehand: a row's
    limit ends it when it is reached.
    """
    model, at_once = smollm2(), 32
    prompts = random_prompts(64, PROMPT, 40000)
    lengths = heavy_tailed_lengths(64, mean=64, longest=256)
    batched = HybridEngine(engine(model).model, tokenizer=None, max_batch=at_once)
    peer = transformers(model)
    kind = peer.better_cache(prompts[:at_once], max(lengths))
    params = SamplingParams(max_new_tokens=max(lengths), ignore_eos=True)

    def mine() -> Outcome:
        answers = batched.generate(prompts, params, max_new_tokens=lengths).tokens
        return checked(answers, lengths)

    def theirs() -> Outcome:
        return checked(peer.generate_to(prompts, lengths, kind, at_once), lengths)

    cost = Cost.of(model)
    info = {
        "kind": "rollout",
        "new_tokens": sum(lengths),
        "flops": cost.generate_flops([PROMPT] * 64, lengths),
        "limit_tokens_per_second": decode_limit(cost, at_once, PROMPT + 64),
    }
    mine()
    contest(benchmark, mine, {f"transformers ({kind} cache, sorted)": theirs}, info=info, rounds=2)


def checked(answers: list[list[int]], lengths: list[int]) -> Outcome:
    assert [len(answer) for answer in answers] == lengths
    return Outcome(sum(lengths))


def bench_generate_groups(benchmark: Any) -> None:
    """8 prompts of 256 tokens, 8 answers of 64 each: a prompt is computed once for its group."""
    model, count, length, n = smollm2(), 8, 256, 8
    prompts = random_prompts(count, length, 40000)
    peer = transformers(model)
    kind = peer.better_cache(prompts, NEW, n)
    params = SamplingParams(max_new_tokens=NEW, n=n, ignore_eos=True)

    def mine() -> Outcome:
        rollout = engine(model).generate(prompts, params)
        assert rollout.counters["prefill_tokens"] == count * length
        return checked(rollout.tokens, [NEW] * count * n)

    def theirs() -> Outcome:
        answers = peer.generate(prompts, NEW, cache=kind, n=n)
        return checked(answers, [NEW] * count * n)

    cost = Cost.of(model)
    info = {
        "kind": "rollout",
        "new_tokens": count * n * NEW,
        "flops": cost.generate_flops([length] * count, [NEW] * count * n, n),
        "limit_tokens_per_second": decode_limit(cost, count * n, length + NEW / 2),
    }
    mine()
    rivals = {f"transformers ({kind} cache, num_return_sequences=8)": theirs}
    contest(benchmark, mine, rivals, info=info, rounds=2)
