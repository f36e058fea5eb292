"""The program for GPUs, on the CPU: bit for bit what the C++ program gives."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrid_engine.engine import HybridEngine, SamplingParams, partial_rollout
from hybrid_engine.engine.device import DeviceGenerator, generator_for, graphs
from hybrid_engine.engine.device.steps import bucket_for
from hybrid_engine.engine.program import NativeGenerator
from hybrid_engine.engine.request import Request
from hybrid_engine.engine.rollout import Rollout
from hybrid_engine.engine.weights import OwnWeights
from hybrid_engine.errors import UserError
from hybrid_engine.models import CausalLM, adapters_disabled
from hybrid_kernels import native_module
from tests.engine.rollouts import assert_same, random_prompts, run
from tests.engine.tape import FakeCuda, TapeRecorder
from tests.engine.test_layouts import LAYOUTS, random_layout
from tests.engine.test_layouts import PROMPTS as LAYOUT_PROMPTS
from tests.engine.test_weight_gate import parts_of

PROMPTS = random_prompts(8)
STOPS = tuple(range(0, 260, 25))
RULES = {
    "plain": SamplingParams(n=2, max_new_tokens=30, seed=4),
    "greedy": SamplingParams(n=2, max_new_tokens=30, temperature=0.0),
    "top-k and top-p": SamplingParams(n=2, max_new_tokens=30, temperature=0.7, top_k=40, top_p=0.9),
}
LAGS = (0, 3)


def on_device(
    generator: DeviceGenerator, params: SamplingParams, prompts: Any = PROMPTS, **options: Any
) -> Rollout:
    samples = list(range(len(prompts) * params.n))
    request = Request(prompts, params, options.pop("stops", list(STOPS)), samples, **options)
    return Rollout(prompts=prompts, n=params.n, **generator.generate(request))


def device_program(model: CausalLM, **options: Any) -> DeviceGenerator:
    return DeviceGenerator(model, OwnWeights(model), **options)


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("rule", RULES)
def test_families_and_rules(model: CausalLM, rule: str, lag: int) -> None:
    expected = run(model, PROMPTS, RULES[rule], STOPS, max_batch=6)
    ours = on_device(device_program(model, lag=lag), RULES[rule], max_batch=6)
    assert_same(ours, expected)
    assert set(expected.finish_reasons) == {"stop", "length"}


@pytest.mark.parametrize("lag", LAGS)
def test_adapters_on_and_off(lora_model: CausalLM, lag: int) -> None:
    params, program = RULES["plain"], device_program(lora_model, lag=lag)
    adapted = run(lora_model, PROMPTS, params, STOPS)
    assert_same(on_device(program, params), adapted)
    with adapters_disabled(lora_model):
        plain = run(lora_model, PROMPTS, params, STOPS)
        assert_same(on_device(program, params), plain)
    assert plain.tokens != adapted.tokens


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_that_a_spec_can_say(layout: str) -> None:
    model, params = random_layout(layout), SamplingParams(n=2, max_new_tokens=70)
    expected = run(model, LAYOUT_PROMPTS, params, max_batch=5)
    ours = on_device(device_program(model), params, LAYOUT_PROMPTS, stops=[], max_batch=5)
    assert_same(ours, expected)


def test_bfloat16_weights(model: CausalLM) -> None:
    model = model.to(torch.bfloat16)
    expected = run(model, PROMPTS, RULES["plain"], STOPS)
    assert_same(on_device(device_program(model), RULES["plain"]), expected)


@pytest.mark.parametrize("max_batch", [1, 7, 8, 9, 16])
def test_batches_around_a_bucket_replay_fixed_addresses(llama: CausalLM, max_batch: int) -> None:
    recorder = TapeRecorder()
    program = device_program(llama, recorder=recorder, lag=2)
    params = SamplingParams(n=3, max_new_tokens=70)
    expected = run(llama, PROMPTS, params, STOPS, max_batch=max_batch)
    assert_same(on_device(program, params, max_batch=max_batch), expected)
    other = SamplingParams(n=3, max_new_tokens=60, temperature=0.8, seed=9)
    expected = run(llama, PROMPTS, other, STOPS, max_batch=max_batch)
    assert_same(on_device(program, other, max_batch=max_batch), expected)
    buckets = {bucket_for(rows, max_batch) for rows in range(1, max_batch + 1)}
    assert recorder.recorded <= len(buckets)  # for both rollouts
    assert recorder.recorded < recorder.replayed


def test_buckets_are_powers_of_two_up_to_the_batch() -> None:
    assert [bucket_for(rows, 12) for rows in (1, 2, 3, 4, 5, 8, 9, 12)] == [
        1, 2, 4, 4, 8, 8, 12, 12,
    ]  # fmt: skip


def test_steps_are_recorded_anew_where_weights_have_moved(llama: CausalLM) -> None:
    recorder = TapeRecorder()
    program, params = device_program(llama, recorder=recorder), RULES["plain"]
    on_device(program, params)
    first = recorder.recorded
    weight = llama.decoder.blocks[0].qkv.weight
    weight.data = weight.data.clone() * 1.5
    assert_same(on_device(program, params), run(llama, PROMPTS, params, STOPS))
    assert recorder.recorded > first
    with torch.no_grad():  # an optimizer's step: the same place, other values
        weight.mul_(0.5)
    second = recorder.recorded
    assert_same(on_device(program, params), run(llama, PROMPTS, params, STOPS))
    assert recorder.recorded == second


@pytest.mark.parametrize("blocks", [3, 5, 9])
@pytest.mark.parametrize("lag", LAGS)
def test_a_small_cache_preempts_and_changes_nothing(llama: CausalLM, blocks: int, lag: int) -> None:
    params = SamplingParams(n=3, max_new_tokens=90)
    usual = run(llama, PROMPTS, params, STOPS)
    small = on_device(
        device_program(llama, lag=lag), params, kv_bytes=blocks * usual.counters["block_bytes"]
    )
    assert_same(small, usual)
    assert small.counters["peak_blocks"] <= small.counters["arena_blocks"] == blocks


def test_preemption_recomputes(llama: CausalLM) -> None:
    params = SamplingParams(n=4, max_new_tokens=150)
    usual = run(llama, PROMPTS, params)
    small = on_device(
        device_program(llama, lag=3), params, stops=[], kv_bytes=12 * usual.counters["block_bytes"]
    )
    assert_same(small, usual)
    assert small.counters["preemptions"] > 0 < small.counters["recomputed_tokens"]


@pytest.mark.parametrize("seed", range(3))
def test_drafts_change_the_work_alone(model: CausalLM, seed: int) -> None:
    params, rng = SamplingParams(n=2, max_new_tokens=50), random.Random(seed)
    usual = run(model, PROMPTS, params, STOPS)
    drafts = [tokens[: rng.randrange(len(tokens) + 1)] + [7] for tokens in usual.tokens]
    expected_new = [float(max(map(len, drafts[i : i + 2]))) for i in range(0, len(drafts), 2)]
    native = run(
        model, PROMPTS, params, STOPS, drafts=drafts, expected_new=expected_new, max_batch=5
    )
    ours = on_device(device_program(model, lag=3), params, drafts=drafts, max_batch=5)
    assert_same(ours, usual)
    for name in ("draft_tokens", "draft_accepted", "passes"):
        assert ours.counters[name] == native.counters[name], name


def test_counts_are_those_of_the_cpp_program_and_late_news_cost_rows(llama: CausalLM) -> None:
    params = SamplingParams(n=3, max_new_tokens=40)
    native = run(llama, PROMPTS, params, STOPS, max_batch=5)
    prompt, late = (
        on_device(device_program(llama, lag=lag), params, max_batch=5).counters for lag in (0, 4)
    )
    assert prompt == {name: native.counters[name] for name in prompt}
    stopped = native.finish_reasons.count("stop")
    assert 0 < late["decode_tokens"] - prompt["decode_tokens"] <= 4 * stopped


def test_limits_expectations_and_one_token(llama: CausalLM) -> None:
    limits = [1, 2, 40, 1, 7, 3, 9, 5]
    params, expected_lengths = SamplingParams(n=3, max_new_tokens=40), [float(x) for x in limits]
    native = run(
        llama, PROMPTS, params, STOPS, prompt_max_new=limits, expected_new=expected_lengths,
        max_batch=4,
    )  # fmt: skip
    ours = on_device(
        device_program(llama, lag=3), params, max_new_tokens=limits,
        expected_lengths=expected_lengths, max_batch=4,
    )  # fmt: skip
    assert_same(ours, native)


def test_no_prompts(llama: CausalLM) -> None:
    assert on_device(device_program(llama), RULES["plain"], []).tokens == []


# The engine's choice, and what it passes through.


def test_the_engine_generates_where_the_parameters_are(llama: CausalLM) -> None:
    weights = OwnWeights(llama)
    assert isinstance(generator_for(llama, weights), NativeGenerator)
    assert isinstance(generator_for(llama.to("meta"), weights), DeviceGenerator)


@pytest.fixture
def engine(llama: CausalLM, monkeypatch: pytest.MonkeyPatch) -> HybridEngine:
    """An engine with the program for GPUs."""
    monkeypatch.setattr(
        "hybrid_engine.engine.hybrid.generator_for",
        lambda model, weights, keeps_cache: DeviceGenerator(model, weights, lag=2),
    )
    return HybridEngine(llama, None)


def test_the_engine_reports_tokens_and_progress(engine: HybridEngine) -> None:
    seen: dict[int, list[int]] = {}
    progress: list[tuple[int, int, int]] = []
    rollout = engine.generate(
        PROMPTS,
        RULES["plain"],
        on_token=lambda sample, token: seen.setdefault(sample, []).append(token),
        on_progress=lambda *counts: progress.append(counts),
    )
    assert [seen[sample] for sample in range(len(rollout))] == rollout.tokens
    assert progress[-1] == (16, 16, sum(map(len, rollout.tokens)))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a bug of the caller's")])
def test_finished_samples_go_with_the_exception(engine: HybridEngine, error: BaseException) -> None:
    limits, params = [3, 200] * 4, SamplingParams(max_new_tokens=200)
    whole = engine.generate(PROMPTS, params, max_new_tokens=limits)
    seen = 0

    def stop(sample: int, token: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 100:
            raise error

    with pytest.raises(type(error)) as caught:
        engine.generate(PROMPTS, params, max_new_tokens=limits, on_token=stop)
    partial = partial_rollout(caught.value)
    assert caught.value is error
    assert partial is not None
    assert partial.samples == [0, 2, 4, 6]
    assert partial.rollout.tokens == [whole.tokens[i] for i in partial.samples]
    again = engine.generate(PROMPTS, params, max_new_tokens=limits)
    assert_same(again, whole)


def test_diverged_weights_and_what_does_not_fit_are_the_users_errors(
    engine: HybridEngine, llama: CausalLM
) -> None:
    engine.kv_bytes = 100
    with pytest.raises(UserError, match="prompt 0 needs a KV cache of .* kv_bytes is 100"):
        engine.generate(PROMPTS, RULES["plain"])
    engine.kv_bytes = 0
    with torch.no_grad():
        llama.decoder.blocks[1].mlp_out.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="NaN"):
        engine.generate(PROMPTS, RULES["plain"])


def test_a_phase_that_ends_lets_go_of_weights_and_cache(engine: HybridEngine) -> None:
    with engine.generation():
        engine.generate(PROMPTS, RULES["plain"])
        assert engine._native._kept is not None
    assert engine._native._kept is None


def test_nothing_is_read_before_it_has_arrived(model: CausalLM) -> None:
    """Weights that come while the first pass runs: each part is NaN until it is announced."""
    expected = run(model, PROMPTS, RULES["plain"], STOPS)
    weights = OwnWeights(model)
    weights.gate = native_module().WeightGate()
    parts = [[p.detach() for p in part] for part in parts_of(model)]
    kept = [[p.clone() for p in part] for part in parts]
    for parameter in (p for part in parts for p in part):
        parameter.fill_(torch.nan)

    def bring() -> None:
        for number, (part, values) in enumerate(zip(parts, kept, strict=True)):
            for parameter, value in zip(part, values, strict=True):
                parameter.copy_(value)
            weights.gate.open(number)

    threading.Timer(0.05, bring).start()
    assert_same(on_device(DeviceGenerator(model, weights, lag=2), RULES["plain"]), expected)
    assert weights.gate.waited_seconds > 0


# Recording.


def test_cuda_graphs_are_recorded_beside_and_replayed(
    llama: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code that a GPU runs, on a ``torch.cuda`` of tapes."""
    cuda = FakeCuda()
    monkeypatch.setattr(graphs, "torch", SimpleNamespace(cuda=cuda))
    recorder = graphs.recorder_for(torch.device("cuda"))
    program = device_program(llama, recorder=recorder, lag=2)
    expected = run(llama, PROMPTS, RULES["plain"], STOPS)
    assert_same(on_device(program, RULES["plain"]), expected)
    assert len(cuda.tapes) >= 2
    assert cuda.calls == [
        "side waits for main", "on side", "off", "main waits for side", "record",
    ] * len(cuda.tapes)  # fmt: skip


def test_a_step_that_looks_at_the_device_cannot_be_recorded() -> None:
    values = torch.ones(2)
    with pytest.raises(RuntimeError, match="waits for the device"):
        TapeRecorder()(lambda: values * values.sum().item())


# On a GPU: the same with real graphs.


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_graphs_give_what_single_calls_do(model: CausalLM, dtype: torch.dtype) -> None:
    model = model.to("cuda", dtype)
    params = RULES["top-k and top-p"]
    graphed = on_device(device_program(model), params, max_batch=7)
    called = on_device(
        device_program(model, recorder=graphs.run_each_time, lag=0), params, max_batch=7
    )
    assert_same(graphed, called)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_greedy_tokens_are_those_of_the_cpu(
    family: str, tiny_directories: dict[str, Path]
) -> None:
    on_cpu = HybridEngine.from_pretrained(tiny_directories[family])
    on_gpu = HybridEngine.from_pretrained(tiny_directories[family], device="cuda")
    params = SamplingParams(max_new_tokens=20, temperature=0.0, ignore_eos=True)
    ours, theirs = (engine.generate(PROMPTS, params) for engine in (on_gpu, on_cpu))
    same = sum(a == b for a, b in zip(ours.tokens, theirs.tokens, strict=True))
    assert same >= 0.9 * len(PROMPTS)  # float32 sums of another order may tip a near tie
