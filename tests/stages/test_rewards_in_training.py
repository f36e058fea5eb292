"""Rewards of several kinds in step 3, and families that run through transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPTNeoXConfig

from tests.stages.runs import Trainer, column, metrics
from tests.tiny import CONTEXT, make_tiny_tokenizer

REWARDS = '''
def length(prompts, completions, completion_ids):
    return [float(len(ids)) for ids in completion_ids]

def often(prompts, topic):
    """Applies to four rows of five; sees a column of the data."""
    return [1.0 if number % 5 else None for number in topic]
'''


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)
    return path


def test_the_reward_is_the_weighted_sum(trainer, prepared, tmp_path, rewards):
    output = shutil.copytree(prepared, tmp_path / "output")
    specs = f"model*0.5,{rewards}:length*-2,{rewards}:often"
    trainer.having({"judge.rewards": specs})(output, "--steps", "3")
    for line in metrics(output, "rlhf"):
        assert line["reward/often"] == 1.0
        assert line["reward/length"] == pytest.approx(line["response_length"])
        known = 0.5 * line["reward/model"] - 2 * line["reward/length"]
        assert known < line["reward"] <= known + 1 + 1e-9


def test_a_reward_function_needs_no_step_2(trainer, tmp_path, rewards):
    grouped = trainer.having(
        {
            "judge.rewards": f"{rewards}:length*-1",
            "rlhf.advantage": "rloo",
            "rlhf.generation.samples_per_prompt": 4,
            "rlhf.iterations": 10,
            "rlhf.epochs": 2,
            "rlhf.actor_optimizer.learning_rate": 1e-2,
        }
    )
    output = grouped(tmp_path / "output", "--steps", "1", "3")
    assert not (output / "reward").exists()
    lengths = column(metrics(output, "rlhf"), "response_length")
    assert sum(lengths[-2:]) < 0.8 * sum(lengths[:2])  # short answers were asked for


@pytest.mark.parametrize("named", [True, False])
def test_other_rewards_let_the_critic_start_from_a_language_model(
    trainer, prepared, tmp_path, rewards, capsys, named
):
    """With a new value head, and with a word about it; the scores do not come from that head."""
    output = shutil.copytree(prepared, tmp_path / "output")
    shutil.rmtree(output / "reward")
    flags = ["--reward-model", str(trainer.model)] if named else []
    capsys.readouterr()
    trainer.having({"judge.rewards": f"{rewards}:length"})(output, "--steps", "3", *flags)
    source = trainer.model if named else output / "sft"
    shown = capsys.readouterr().out
    assert f"rlhf: the policy starts from {output / 'sft'}" in shown
    assert f"rlhf: the critic starts from {source}, with a new value head" in shown
    lines = metrics(output, "rlhf")
    assert all(line["reward"] == line["response_length"] for line in lines)
    assert all("value_loss" in line for line in lines)


def make_foreign_model(directory: Path, family: str) -> Path:
    tokenizer = make_tiny_tokenizer(pad_is_eos=False)
    special = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    if family == "gpt_neox":
        config = GPTNeoXConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=CONTEXT,
            **special,
        )
    else:
        config = BloomConfig(
            vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4, **special
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", ["gpt_neox", "bloom"])
def test_a_family_without_native_decoder_takes_all_steps(preferences, tmp_path, capsys, family):
    model = make_foreign_model(tmp_path / "foreign", family)
    capsys.readouterr()
    output = Trainer(model, preferences).having({"zero_stage": 2})(tmp_path / "output")
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("warning: no native decoder for") == 1
    assert shown.err == ""
    assert max(column(metrics(output, "rlhf"), "first_log_ratio")) < 1e-5
    results = json.loads((output / "summary.json").read_text())
    assert results["sft"]["heldout_loss_after"] < results["sft"]["heldout_loss_before"]
    AutoModelForCausalLM.from_pretrained(output / "rlhf/actor")


def test_a_family_without_native_decoder_has_no_adapters(preferences, tmp_path, capsys):
    model = make_foreign_model(tmp_path / "foreign", "gpt_neox")
    Trainer(model, preferences).having({"model.lora_r": 4})(tmp_path / "output", expect=2)
    assert "native decoder" in capsys.readouterr().err
