"""LoRA and top layers: what is trained, what is shared, and that sharing changes no number."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hybrid_engine.models import (
    adapted_linears,
    adapters_disabled,
    load_causal_lm,
    pack,
    response_rows,
)
from hybrid_engine.stages import cast as cast_module
from hybrid_engine.stages import rlhf
from tests.stages.runs import check_close, column, files, metrics

SENTENCE = list(b"film 7 is good")


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list:
    """The models of the runs' third steps."""
    seen = []
    assemble = rlhf.assemble

    def keep(*args):
        seen.append(assemble(*args))
        return seen[-1]

    monkeypatch.setattr(rlhf, "assemble", keep)
    return seen


def logprobs(model) -> torch.Tensor:
    batch = pack([SENTENCE])
    with torch.no_grad():
        return model(batch, *response_rows(batch, [1])).logprobs


@pytest.mark.parametrize("advantage", ["gae", "grpo"])
def test_lora_trains_adapters_and_saves_them_merged(trainer, tmp_path, casts, advantage):
    settings = {"model.lora_r": 4, "rlhf.advantage": advantage}
    settings["rlhf.generation.samples_per_prompt"] = 1 if advantage == "gae" else 2
    output = trainer.having(settings)(tmp_path)
    actor, start = casts[0].actor.model, load_causal_lm(output / "sft")

    assert casts[0].reference is None
    trained = {n: p for n, p in actor.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert all(float(p.detach().abs().max()) > 0 for p in trained.values())
    base = dict(start.named_parameters())
    frozen = {n: p for n, p in actor.named_parameters() if not p.requires_grad}
    assert all(torch.equal(p, base[n]) for n, p in frozen.items())

    with adapters_disabled(actor):
        assert torch.equal(logprobs(actor), logprobs(start))  # what serves as the reference
    lines = metrics(output, "rlhf")
    assert lines[0]["kl"] == 0.0
    assert lines[-1]["kl"] != 0.0
    assert column(lines, "first_log_ratio") == [0.0, 0.0, 0.0]

    saved = AutoModelForCausalLM.from_pretrained(output / "rlhf/actor")
    with torch.no_grad():
        logits = saved(torch.tensor([SENTENCE])).logits[0, :-1].log_softmax(-1)
    merged = logits.gather(1, torch.tensor(SENTENCE[1:])[:, None]).squeeze(1)
    torch.testing.assert_close(merged, logprobs(actor), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(merged, logprobs(start), atol=1e-4)
    assert not any("lora" in name for name in load_file(output / "rlhf/actor/model.safetensors"))


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
