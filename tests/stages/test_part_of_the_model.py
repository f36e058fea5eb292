"""LoRA and top layers: what is trained, what is shared, and that sharing changes no number."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hybrid_engine.engine import TrainEngine
from hybrid_engine.models import (
    adapted_linears,
    is_quantized,
    last_rows,
    load_causal_lm,
    load_scalar_model,
    pack,
    response_rows,
)
from hybrid_engine.stages import cast as cast_module
from hybrid_engine.stages import rlhf
from hybrid_kernels import ops
from hybrid_kernels.nn import linear as linear_module
from tests.stages.runs import check_close, column, files, metrics

SENTENCE = list(b"film 7 is good")


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list:
    """The models of the runs' third steps, which stay whole to be looked at."""
    seen = []
    assemble = rlhf.assemble

    def keep(*args):
        seen.append(assemble(*args))
        return seen[-1]

    monkeypatch.setattr(rlhf, "assemble", keep)
    monkeypatch.setattr(TrainEngine, "close", lambda self: None)
    return seen


def logprobs(model) -> torch.Tensor:
    batch = pack([SENTENCE])
    with torch.no_grad():
        return model(batch, *response_rows(batch, [1])).logprobs


def opened_by_peft(adapter: Path) -> torch.Tensor:
    """Log-probabilities of the sentence, by transformers and PEFT."""
    model = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)  # on the base that it names
    with torch.no_grad():
        logits = model(torch.tensor([SENTENCE])).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, torch.tensor(SENTENCE[1:])[:, None]).squeeze(1)


@pytest.mark.parametrize("advantage", ["gae", "grpo"])
def test_lora_trains_adapters_and_saves_them(trainer, tmp_path, casts, advantage):
    settings = {"model.lora_r": 4, "rlhf.advantage": advantage, "rlhf.ema_decay": 0.5}
    settings["rlhf.generation.samples_per_prompt"] = 1 if advantage == "gae" else 2
    output = trainer.having({**settings, "model.lora_merge": advantage == "gae"})(tmp_path)
    actor, start = casts[0].actor.model, load_causal_lm(output / "sft")

    trained = {n: p for n, p in actor.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert all(float(p.detach().abs().max()) > 0 for p in trained.values())
    base = dict(start.named_parameters())
    frozen = {n: p for n, p in actor.named_parameters() if not p.requires_grad}
    assert all(torch.equal(p, base[n]) for n, p in frozen.items())

    lines = metrics(output, "rlhf")
    assert lines[0]["kl"] == 0.0
    assert lines[-1]["kl"] != 0.0
    assert column(lines, "first_log_ratio") == [0.0, 0.0, 0.0]

    saved = output / "rlhf/actor"
    assert torch.equal(logprobs(load_causal_lm(saved)), logprobs(actor))
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(opened_by_peft(saved), logprobs(actor), **close)
    assert not torch.allclose(logprobs(actor), logprobs(start), atol=1e-4)
    average = load_causal_lm(output / "rlhf/actor_ema")
    assert not torch.equal(logprobs(average), logprobs(actor))
    assert (saved / "merged").exists() == (advantage == "gae")
    if advantage == "gae":
        merged = load_causal_lm(saved / "merged")
        torch.testing.assert_close(logprobs(merged), logprobs(actor), **close)
        critic = load_scalar_model(output / "rlhf/critic")
        for name, parameter in casts[0].critic.module.named_parameters():
            assert torch.equal(parameter, critic.get_parameter(name)), name


def test_steps_before_the_last_leave_a_whole_model_and_its_adapter(trainer, tmp_path, tiny_model):
    output = trainer.having({"model.lora_r": 4, "model.lora_rslora": True})(
        tmp_path, "--steps", "1", "2", "--lora-target-modules", "q_proj", "down_proj"
    )
    merged, adapter = load_causal_lm(output / "sft"), output / "sft/adapter"
    torch.testing.assert_close(opened_by_peft(adapter), logprobs(merged), rtol=0, atol=1e-5)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_model.resolve())
    assert settings["target_modules"] == ["down_proj", "q_proj"]
    assert settings["use_rslora"] is True
    batch = pack([SENTENCE])
    whole, parts = (load_scalar_model(output / p) for p in ("reward", "reward/adapter"))
    with torch.no_grad():
        scores = [model(batch, last_rows(batch)) for model in (whole, parts)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-5)


def test_the_reference_is_the_actor_itself(trainer, tmp_path, casts, monkeypatch):
    """No second model: what the reference computes with lies in the actor's own storage."""
    settings = {"model.lora_r": 4, "rlhf.advantage": "rloo", "judge.fluency": True}
    settings["rlhf.generation.samples_per_prompt"] = 2
    output = trainer.having(settings)(tmp_path)
    cast = casts[0]
    assert cast.reference is None
    assert cast.critic is None
    own = {p.data_ptr(): n for n, p in cast.actor.model.named_parameters()}
    used: list[int] = []
    linear = linear_module.ops.linear

    def watched(x, weight, *rest):
        used.append(weight.data_ptr())
        assert not any(isinstance(r, torch.Tensor) and "lora" in own[r.data_ptr()] for r in rest)
        return linear(x, weight, *rest)

    monkeypatch.setattr(linear_module.ops, "linear", watched)
    batch = pack([SENTENCE])
    scores = cast.reference_scores(batch, *response_rows(batch, [1]), 1.0, None)
    monkeypatch.undo()
    assert {own[pointer].split(".")[-2] for pointer in used} == {
        *("qkv", "attn_out", "mlp_in", "mlp_out")
    }
    assert torch.equal(scores.logprobs, logprobs(load_causal_lm(output / "sft")))
    # The model that the run started from: what step 1 left alone is held once.
    assert cast.original.decoder.embed_tokens.weight.data_ptr() in own


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_adapters_merged_while_generating(trainer, tmp_path, casts, zero_stage):
    settings = {"model.lora_r": 4, "zero_stage": zero_stage}
    settings["rlhf.generation.merge_adapters"] = True
    output = trainer.having(settings)(tmp_path)
    policy = casts[0].policy
    base = dict(load_causal_lm(output / "sft").named_parameters())
    with policy.full_parameters():
        for name, parameter in policy.module.named_parameters():
            assert parameter.requires_grad or torch.equal(parameter, base[name]), name
    lines = metrics(output, "rlhf")
    assert lines[0]["first_log_ratio"] == 0.0  # B is zero still
    assert 0 < max(column(lines, "first_log_ratio")) < 1e-4


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_frozen_weights_may_be_watched(trainer, tmp_path, monkeypatch, capsys, dtype):
    """--verify-frozen: a run whose merged weights are not taken out again ends at that rollout."""
    settings = {"model.lora_r": 4, "model.verify_frozen": True, "model.dtype": dtype}
    settings["rlhf.generation.merge_adapters"] = True
    output = trainer.having(settings)(tmp_path)
    assert len(metrics(output, "rlhf")) == 3
    monkeypatch.setattr(ops, "lora_unmerge_", lambda *_: None)
    trainer.having(settings)(tmp_path, "--steps", "3", "--overwrite", expect=1)
    assert len(metrics(output, "rlhf")) == 1  # B was zero in the first rollout
    assert "actor: the frozen weight decoder.blocks.0.qkv.weight has changed" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_on_a_base_in_few_bits(trainer, tmp_path, casts, bits):
    pytest.importorskip("bitsandbytes")
    settings = {"model.lora_r": 4, "model.lora_base_bits": bits, "model.verify_frozen": True}
    output = trainer.having(settings)(tmp_path, "--zero-stage", "2")
    assert column(metrics(output, "rlhf"), "first_log_ratio") == [0.0, 0.0, 0.0]
    assert metrics(output, "rlhf")[0]["kl"] == 0.0
    for model in (casts[0].actor.model, casts[0].critic.module):
        assert all(
            p.dtype == torch.uint8 for n, p in model.named_parameters() if n.endswith("original")
        )
        assert is_quantized(model)
    saved = output / "rlhf/actor"  # on the base as it was before it was quantized
    again = load_causal_lm(saved, base_bits=bits)
    assert torch.equal(logprobs(again), logprobs(casts[0].actor.model))
    refused = trainer.having(settings)
    refused(tmp_path / "sharded", "--zero-stage", "3", expect=2)


def test_dropout_acts_in_the_supervised_steps_alone(trainer, tmp_path):
    settings = {"model.lora_r": 4, "model.lora_dropout": 0.3}
    output = trainer.having(settings)(tmp_path / "dropped")
    plain = trainer.having({"model.lora_r": 4})(tmp_path / "plain", "--steps", "1", "2")
    again = trainer.having(settings)(tmp_path / "again", "--steps", "1")
    first = [column(metrics(o, "sft"), "loss")[0] for o in (output, again, plain)]
    assert first[0] == first[1] == first[2]  # B is zero still
    last = [column(metrics(o, "sft"), "loss")[-1] for o in (output, again, plain)]
    assert last[0] == last[1] != last[2]
    assert (
        column(metrics(output, "reward"), "loss")[-1]
        != column(metrics(plain, "reward"), "loss")[-1]
    )
    assert column(metrics(output, "rlhf"), "first_log_ratio") == [0.0, 0.0, 0.0]
    dropouts = [
        json.loads((output / path / "adapter_config.json").read_text())["lora_dropout"]
        for path in ("sft/adapter", "reward/adapter", "rlhf/actor", "rlhf/critic")
    ]
    assert dropouts == [0.3, 0.3, 0.0, 0.0]


def test_a_run_starts_from_an_adapter(trainer, tmp_path, casts):
    """Of PEFT's: merged with its base first, which the new adapter then goes on."""
    base = AutoModelForCausalLM.from_pretrained(trainer.model)
    peer = peft.get_peft_model(
        base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"])
    ).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        ids = torch.tensor([SENTENCE])
        logits = peer(ids).logits[0, :-1].log_softmax(-1)
    expected = logits.gather(1, ids[0, 1:, None]).squeeze(1)
    peer.save_pretrained(tmp_path / "adapter")
    reward = tmp_path / "reward.py"
    reward.write_text("def length(prompts, completions):\n    return [*map(len, completions)]\n")
    settings = {"model.lora_r": 4, "rlhf.advantage": "rloo", "judge.rewards": f"{reward}:length"}
    settings["rlhf.generation.samples_per_prompt"] = 2
    run = replace(trainer.having(settings), model=tmp_path / "adapter")
    output = run(tmp_path / "output", "--steps", "3")
    start = load_causal_lm(output / "start/actor")
    torch.testing.assert_close(logprobs(start), expected, rtol=0, atol=1e-5)
    assert metrics(output, "rlhf")[0]["kl"] == 0.0
    actor = output / "rlhf/actor"
    settings = json.loads((actor / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str((output / "start/actor").resolve())
    torch.testing.assert_close(
        opened_by_peft(actor), logprobs(casts[0].actor.model), rtol=0, atol=1e-5
    )
    written = (output / "start/actor/model.safetensors").stat().st_mtime_ns
    run(output, "--steps", "3", "--overwrite")
    assert (output / "start/actor/model.safetensors").stat().st_mtime_ns == written


def test_a_target_that_is_no_layer_is_named(trainer, tmp_path, capsys):
    wrong = trainer.having({"model.lora_r": 4, "model.lora_target_modules": "q_proj,qproj"})
    wrong(tmp_path / "output", expect=2)
    shown = capsys.readouterr().err
    assert "LoRA target 'qproj' is no linear layer" in shown


def test_a_shared_trunk_changes_no_bit(trainer, tmp_path, casts, monkeypatch):
    top = trainer.having({"model.trainable_layers": 1, "judge.fluency": True})
    shared = top(tmp_path / "shared")
    monkeypatch.setattr(cast_module, "share_frozen_trunk", lambda models: 0)
    apart = top(tmp_path / "apart", "--steps", "1", "2", "3")
    assert [cast.shared_blocks for cast in casts] == [1, 0]
    assert metrics(shared) == metrics(apart)
    assert files(shared) == files(apart)


def test_parameters_that_zero_3_scatters_are_not_shared(trainer, tmp_path, casts):
    """The stage may come from the user's own DeepSpeed file."""
    settings = tmp_path / "ds.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    top = trainer.having({"model.trainable_layers": 1})
    scattered = top(tmp_path / "scattered", "--deepspeed", str(settings))
    whole = top(tmp_path / "whole")
    assert [cast.shared_blocks for cast in casts] == [0, 1]
    check_close(scattered, whole)


def test_only_the_top_moves(trainer, tiny_model, tmp_path):
    trainer.having({"model.trainable_layers": 1})(tmp_path)
    before = load_file(tiny_model / "model.safetensors")
    after = load_file(tmp_path / "rlhf/actor/model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith(("model.layers.1.", "model.norm.")) for name in moved)


def test_adapters_follow_the_seed(trainer, tmp_path, casts):
    adapted = trainer.having({"model.lora_r": 4, "sft.max_steps": 1, "reward.max_steps": 1})
    for seed in ("0", "1"):
        adapted.having({"rlhf.iterations": 1, "seed": seed})(tmp_path / seed)
    first, second = ({n: m.lora_a for n, m in adapted_linears(cast.actor.model)} for cast in casts)
    assert not any(torch.allclose(first[name], second[name], atol=0.01) for name in first)


def test_a_bounded_cache_changes_no_bit(trainer, trained, tmp_path, casts):
    """Two blocks of 64 tokens: two sequences at a time, the others wait."""
    bounded = trainer.having({"rlhf.generation.kv_bytes": 2 * 32768})
    output = bounded(tmp_path / "output")
    assert casts[0].actor.kv_bytes == 2 * 32768
    assert metrics(output) == metrics(trained)
    assert files(output) == files(trained)


def test_both_at_once_are_refused(trainer, tmp_path, capsys):
    both = trainer.having({"model.trainable_layers": 1, "model.lora_r": 4})
    both(tmp_path / "output", expect=2)
    assert "choose one way" in capsys.readouterr().err


def test_gradient_checkpointing_changes_no_bit(trainer, trained, tmp_path):
    output = trainer.having({"model.gradient_checkpointing": True})(tmp_path / "output")
    assert metrics(output) == metrics(trained)
    assert files(output) == files(trained)
    shutil.rmtree(output)
