"""One storage, two uses: what training writes, generation reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_engine.config import OptimizerConfig
from hybrid_engine.engine import HybridEngine, SamplingParams, TrainEngine
from hybrid_engine.engine.program import ProgramBuilder
from hybrid_engine.errors import UserError
from hybrid_engine.models import CausalLM, load_causal_lm, pack, response_rows
from hybrid_kernels import native_module
from tests.engine.conftest import load_sharpened
from tests.engine.rollouts import ONE_GREEDY, random_prompts

PROMPTS = random_prompts(5)
GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)


def trainable(directory: Path, stage: int) -> HybridEngine:
    model = load_sharpened(directory)
    config = OptimizerConfig(learning_rate=0.05, schedule="constant", warmup_ratio=0.0)
    return HybridEngine(
        model, None, TrainEngine(model, config, 1, {"zero_optimization": {"stage": stage}})
    )


def train_once(engine: HybridEngine) -> None:
    batch = pack([[1, 2, 3, 4, 5, 6]])
    rows, targets = response_rows(batch, [1])
    with engine.training():
        engine.train_engine.backward(-engine.train_engine(batch, rows, targets).logprobs.sum(), 5)
        engine.train_engine.step()


def test_the_program_points_at_the_module(model: CausalLM) -> None:
    builder = ProgramBuilder(model)
    program = builder.build()
    builder.bind(program, 64)
    pointers = program.bound_pointers()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert {name: p.data_ptr() for name, p in parameters.items()} == {
        name: pointer for name, pointer in pointers.items() if name not in ("rope_cos", "rope_sin")
    }
    program.unbind()
    assert program.bound_pointers() == {}


def test_an_update_in_place_is_seen_without_binding_again(llama: CausalLM) -> None:
    builder = ProgramBuilder(llama)
    program = builder.build()
    builder.bind(program, 64)
    before = program.generate([[1, 2, 3]], **ONE_GREEDY)
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    after = program.generate([[1, 2, 3]], **ONE_GREEDY)
    assert before["tokens"].tolist() != after["tokens"].tolist()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_optimizer_step_changes_the_next_rollout(
    tiny_directories: dict[str, Path], stage: int
) -> None:
    engine = trainable(tiny_directories["llama"], stage)
    before = engine.generate(PROMPTS, GREEDY)
    pointers = {name: p.data_ptr() for name, p in engine.model.named_parameters()}
    train_once(engine)
    after = engine.generate(PROMPTS, GREEDY)
    assert before.tokens != after.tokens
    if stage < 3:  # ZeRO-3 keeps shards between uses
        assert {name: p.data_ptr() for name, p in engine.model.named_parameters()} == pointers
    again = engine.token_logprobs(after.sequences, after.prompt_lengths)
    assert [row.tolist() for row in again] == after.logprobs


def test_phases_do_not_nest(llama: CausalLM) -> None:
    engine = HybridEngine(llama, None)
    with engine.generation():
        with (
            pytest.raises(RuntimeError, match=r"training\(\) inside generation\(\)"),
            engine.training(),
        ):
            pass
        assert len(engine.generate([[1]], GREEDY)) == 1
    with engine.training():
        assert engine.model.training
        with pytest.raises(RuntimeError, match=r"generation\(\) inside training\(\)"):
            engine.generate([[1]], GREEDY)
    assert not engine.model.training


def test_the_end_of_generation_lets_go_of_the_parameters(llama: CausalLM) -> None:
    engine = HybridEngine(llama, None)
    with engine.generation():
        engine.generate([[1]], GREEDY)
        assert engine._native.program.bound_pointers()
    assert not engine._native.program.bound_pointers()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 1 is empty"),
        ([260], "prompt 1 has token id 260, outside the model's vocabulary of 260"),
        ([-1], "prompt 1 has token id -1"),
        (
            [3] * 512,
            "prompt 1 has 512 tokens, which leaves no room .* the model's context of 512",
        ),
    ],
)
def test_prompts_that_cannot_be_served_are_named(
    llama: CausalLM, prompt: list[int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        HybridEngine(llama, None).generate([[1], prompt], GREEDY)


def test_a_cache_too_small_is_an_error_of_the_user(llama: CausalLM) -> None:
    with pytest.raises(UserError, match="needs a KV cache of 32768 bytes"):
        HybridEngine(llama, None, kv_bytes=1000).generate([[1]], GREEDY)


def test_weights_that_the_kernels_cannot_read_are_refused_with_what_works(
    tiny_directories: dict[str, Path],
) -> None:
    engine = HybridEngine.from_pretrained(tiny_directories["llama"], dtype="float16")
    with pytest.raises(UserError, match='is float16 on cpu; .* dtype="float32" or "bfloat16"'):
        engine.generate([[1]], GREEDY)


def test_every_declared_end_token_ends_a_response(
    tiny_directories: dict[str, Path], tmp_path: Path
) -> None:
    engine = HybridEngine.from_pretrained(tiny_directories["opt"])
    assert engine.eos_token_ids == (257,)
    engine.save_pretrained(tmp_path / "copy")
    config_file = tmp_path / "copy" / "generation_config.json"
    config_file.write_text(
        json.dumps(json.loads(config_file.read_text()) | {"eos_token_id": [5, 9]})
    )
    engine = HybridEngine.from_pretrained(tmp_path / "copy")
    assert engine.eos_token_ids == (257, 5, 9)
    params = SamplingParams(n=50, max_new_tokens=60)
    rollout = engine.generate([[1, 2]], params)
    assert {
        tokens[-1] for tokens, why in zip(rollout.tokens, rollout.finish_reasons) if why == "stop"
    } <= {5, 9, 257}
    assert "stop" in rollout.finish_reasons
    ignoring = engine.generate([[1, 2]], SamplingParams(n=50, max_new_tokens=60, ignore_eos=True))
    assert ignoring.finish_reasons == ["length"] * 50


def test_tokens_stream_in_order(llama: CausalLM) -> None:
    streamed: dict[int, list[int]] = {}
    rollout = HybridEngine(llama, None, max_batch=3).generate(
        PROMPTS,
        SamplingParams(n=2, max_new_tokens=9),
        on_token=lambda sample, token: streamed.setdefault(sample, []).append(token),
    )
    assert [streamed[i] for i in range(len(rollout))] == rollout.tokens


def test_scores_do_not_depend_on_the_size_of_a_pass(llama: CausalLM) -> None:
    sequences, lengths = random_prompts(9, seed=2), [1, 3, 64, 65, 1, 1, 1, 1, 1]
    small, large = (
        HybridEngine(llama, None, score_tokens=budget).token_logprobs(sequences, lengths)
        for budget in (1, 10_000)
    )
    assert [len(row) for row in large] == [len(s) - n for s, n in zip(sequences, lengths)]
    assert all(torch.equal(a, b) for a, b in zip(small, large))


def test_the_plain_generator_stands_in_for_the_native_library(
    llama: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(n=2, max_new_tokens=8, top_k=40)
    native = HybridEngine(llama, None).generate(PROMPTS, params)
    monkeypatch.setattr("hybrid_engine.engine.hybrid.native_available", lambda: False)
    plain = HybridEngine(llama, None).generate(PROMPTS, params)
    assert plain.tokens == native.tokens
    assert plain.finish_reasons == native.finish_reasons


class TestBindMessages:
    """The program names the parameter, what it expected and what it got."""

    @pytest.fixture
    def parts(self, tiny_directories: dict[str, Path]) -> tuple[object, dict[str, torch.Tensor]]:
        builder = ProgramBuilder(load_causal_lm(tiny_directories["llama"]))
        return builder.build(), builder.tensors(64)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t[:, :-1].contiguous(), r"expected shape \[128, 64\], got \[128, 63\]"),
            (lambda t: t.double(), "expected float32 or bfloat16, got Double"),
            (lambda t: t.T.contiguous().T, "expected a contiguous tensor"),
        ],
    )
    def test_a_wrong_tensor(self, parts, change, message) -> None:  # type: ignore[no-untyped-def]
        program, tensors = parts
        name = "decoder.blocks.1.qkv.weight"
        with pytest.raises(ValueError, match=f"'{name}' {message}"):
            program.bind(tensors | {name: change(tensors[name])})

    def test_a_missing_and_a_foreign_parameter(self, parts) -> None:  # type: ignore[no-untyped-def]
        program, tensors = parts
        with pytest.raises(
            ValueError, match="'score.weight' .* belongs to no part of this decoder"
        ):
            program.bind(tensors | {"score.weight": torch.zeros(1, 64)})
        del tensors["decoder.final_norm.weight"]
        with pytest.raises(
            ValueError,
            match=r"missing parameter 'decoder.final_norm.weight', expected shape \[64\]",
        ):
            program.bind(tensors)

    def test_an_untied_head_in_a_tied_decoder(self, parts) -> None:  # type: ignore[no-untyped-def]
        program, tensors = parts
        with pytest.raises(ValueError, match="must be the storage of decoder.embed_tokens.weight"):
            program.bind(tensors | {"head.weight": tensors["head.weight"].clone()})

    def test_a_wrong_spec(self, tiny_directories: dict[str, Path]) -> None:
        spec = load_causal_lm(tiny_directories["llama"]).spec.as_dict()
        with pytest.raises(
            ValueError, match="'norm' must be one of rms_norm, layer_norm; got 'batch_norm'"
        ):
            native_module().DecodeProgram(spec | {"norm": "batch_norm"})
        del spec["head_dim"]
        with pytest.raises(ValueError, match="spec has no field 'head_dim'"):
            native_module().DecodeProgram(spec)


def test_generating_before_binding_is_refused(llama: CausalLM) -> None:
    program = ProgramBuilder(llama).build()
    with pytest.raises(RuntimeError, match=r"bind\(\) comes first"):
        program.generate([[1]], **ONE_GREEDY)


@pytest.mark.parametrize("trains", [False, True])
def test_an_engine_that_never_trains_keeps_its_cache(
    tiny_directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch, trains: bool
) -> None:
    class Counted:
        """The program, with its returned caches counted."""

        def __init__(self, program: Any) -> None:
            self.program, self.returned = program, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.program, name)

        def release_cache(self) -> None:
            self.returned += 1
            self.program.release_cache()

    build = ProgramBuilder.build
    monkeypatch.setattr(ProgramBuilder, "build", lambda self: Counted(build(self)))
    directory = tiny_directories["llama"]
    engine = trainable(directory, 0) if trains else HybridEngine(load_sharpened(directory), None)
    first, second = (engine.generate(PROMPTS, GREEDY) for _ in range(2))
    assert engine._native.program.returned == (2 if trains else 0)
    assert first.tokens == second.tokens  # whatever an earlier rollout left in the cache
    assert first.logprobs == second.logprobs
