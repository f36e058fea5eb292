"""Where responses end, and what the program refuses."""

from __future__ import annotations

import pytest
import torch

from hybrid_engine.engine.program import ProgramBuilder
from hybrid_engine.engine.reference_generate import reference_generate
from hybrid_engine.engine.request import Request
from hybrid_engine.engine.sampling import SamplingParams
from hybrid_engine.models import CausalLM
from tests.engine.rollouts import ONE_GREEDY, random_prompts, run

PROMPTS = random_prompts(6)


def test_any_of_several_stop_tokens_ends_a_response_and_is_kept(llama: CausalLM) -> None:
    free = run(llama, PROMPTS, SamplingParams(max_new_tokens=30))
    stops = (free.tokens[0][5], free.tokens[1][9], free.tokens[2][0])
    stopped = run(llama, PROMPTS, SamplingParams(max_new_tokens=30), stops)
    for response, whole, reason in zip(
        stopped.tokens, free.tokens, stopped.finish_reasons, strict=True
    ):
        ends = [i for i, token in enumerate(whole) if token in stops]
        assert response == whole[: ends[0] + 1 if ends else 30]
        assert reason == ("stop" if ends else "length")


def test_a_response_may_be_its_stop_token_alone(llama: CausalLM) -> None:
    rollout = run(llama, PROMPTS, SamplingParams(n=3, max_new_tokens=30), tuple(range(260)))
    assert [len(tokens) for tokens in rollout.tokens] == [1] * 18
    assert rollout.finish_reasons == ["stop"] * 18
    assert rollout.counters["decode_steps"] == 0


def test_one_new_token(model: CausalLM) -> None:
    one = run(model, PROMPTS, SamplingParams(max_new_tokens=1))
    more = run(model, PROMPTS, SamplingParams(max_new_tokens=3))
    assert one.tokens == [tokens[:1] for tokens in more.tokens]
    assert one.logprobs == [values[:1] for values in more.logprobs]
    assert one.finish_reasons == ["length"] * 6


def test_a_stop_token_at_the_limit_counts_as_a_stop(llama: CausalLM) -> None:
    free = run(llama, PROMPTS[:1], SamplingParams(max_new_tokens=4))
    last = free.tokens[0][3]
    assert last not in free.tokens[0][:3]
    assert run(llama, PROMPTS[:1], SamplingParams(max_new_tokens=4), (last,)).finish_reasons == [
        "stop"
    ]


def test_the_context_ends_a_response(model: CausalLM) -> None:
    context = model.spec.max_positions
    prompts = [[5] * (context - 1), [6] * (context - 3), [7]]
    rollout = run(model, prompts, SamplingParams(max_new_tokens=10), poison_freed_blocks=True)
    assert [len(tokens) for tokens in rollout.tokens] == [1, 3, 10]
    assert rollout.finish_reasons == ["length"] * 3


def test_no_prompts_give_an_empty_rollout(llama: CausalLM) -> None:
    rollout = run(llama, [], SamplingParams())
    assert len(rollout) == 0
    assert rollout.finish_reasons == []


def test_a_cache_too_small_for_one_prompt_says_how_much_it_needs(llama: CausalLM) -> None:
    # 2 layers, 2 heads, keys and values of 16 floats: 64 tokens take 2 * 2 * 2 * 64 * 16 * 4 bytes.
    block = 32768
    with pytest.raises(
        ValueError, match=f"prompt 1 .70 tokens .* {2 * block} bytes, but kv_bytes is {block}"
    ):
        run(llama, [[1] * 10, [2] * 70], SamplingParams(max_new_tokens=20), kv_bytes=block)
    assert len(run(llama, [[2] * 70], SamplingParams(max_new_tokens=20), kv_bytes=2 * block)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
        ({"max_prefill_rows": 0}, "max_prefill_rows must be at least 1, got 0"),
        ({"sample_ids": [1]}, r"one sample id a sample \(6\), got 1"),
        ({"expected_new": [1.0]}, "expected_new must be empty or have one length a prompt"),
    ],
)
def test_wrong_options_are_refused(llama: CausalLM, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(llama, PROMPTS, SamplingParams(), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or at least 1e-6"),
        ({"temperature": float("nan")}, "temperature must be 0 or at least 1e-6"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
    ],
)
def test_the_program_checks_the_rule_itself(llama: CausalLM, change: dict, message: str) -> None:
    builder = ProgramBuilder(llama)
    program = builder.build()
    builder.bind(program, 512)
    with pytest.raises(ValueError, match=message):
        program.generate([[1]], **(ONE_GREEDY | change))


def test_weights_that_are_not_finite_end_the_call(llama: CausalLM) -> None:
    with torch.no_grad():
        llama.decoder.blocks[1].mlp_out.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="token 0 of sample 0 are no distribution"):
        run(llama, PROMPTS, SamplingParams())


def test_progress_reaches_the_end(llama: CausalLM) -> None:
    seen: list[tuple[int, int, int]] = []
    rollout = run(
        llama, PROMPTS, SamplingParams(max_new_tokens=5), on_progress=lambda *now: seen.append(now)
    )
    assert seen[-1] == (6, 6, sum(map(len, rollout.tokens)))
    assert seen == sorted(seen)


def test_an_exception_in_the_callback_leaves_the_program_usable(llama: CausalLM) -> None:
    builder = ProgramBuilder(llama)
    program = builder.build()
    builder.bind(program, 512)

    def interrupt(done: int, total: int, tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        program.generate([[1, 2]], on_progress=interrupt, **ONE_GREEDY)
    assert program.generate([[1, 2]], **ONE_GREEDY)["tokens"].shape == (8,)


def test_binding_during_generation_is_refused(llama: CausalLM) -> None:
    builder = ProgramBuilder(llama)
    program = builder.build()
    builder.bind(program, 512)
    with pytest.raises(RuntimeError, match=r"unbind: generate\(\) is running"):
        program.generate([[1]], **ONE_GREEDY, on_progress=lambda *_: program.unbind())


@pytest.mark.parametrize("native", [True, False])
def test_prompts_have_limits_of_their_own(llama: CausalLM, native: bool) -> None:
    limits = [1, 9, 30, 99, 5, 12]
    params = SamplingParams(n=2, max_new_tokens=30)
    free = run(llama, PROMPTS, params)
    if native:
        tokens = run(llama, PROMPTS, params, prompt_max_new=limits).tokens
    else:
        request = Request(PROMPTS, params, [], list(range(12)), max_new_tokens=limits)
        tokens = reference_generate(llama, request)["tokens"]
    assert tokens == [row[: limits[i // 2]] for i, row in enumerate(free.tokens)]
