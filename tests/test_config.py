"""Values that would train nonsense, or end as a failure hours later, are refused at once."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hybrid_engine.config import DataConfig, OptimizerConfig, PPOConfig, RunConfig
from hybrid_engine.config.options import in_words, lies_within
from hybrid_engine.errors import UserError
from hybrid_engine.fields import build, settings


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        build(values)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "words"),
    [
        ("[0, inf)", [0, 5], [-1, math.inf, math.nan], "0 or more"),
        ("(0, inf)", [1e-9], [0, -1], "a number above 0"),
        ("(0, 1)", [0.5], [0, 1], "a number in (0, 1)"),
        ("[0, 1]", [0, 1], [-0.1, 1.1], "a number in [0, 1]"),
        ("[0, 1)", [0, 0.99], [1, math.nan], "a number in [0, 1)"),
    ],
)
def test_intervals(interval, inside, outside, words):
    assert all(lies_within(value, interval) for value in inside)
    assert not any(lies_within(value, interval) for value in outside)
    assert in_words(interval) == words


BAD = {
    "seed": [-1, 2**63],
    "keep_checkpoints": [0],
    "model.lora_alpha": [0.0],
    "model.lora_r": [-1],
    "model.lora_dropout": [-0.1, 1.0],
    "model.trainable_layers": [-1],
    "data.heldout_fraction": [0.0, 1.0],
    "data.max_rows": [-1],
    "data.max_heldout": [-1],
    "data.prompt_words": [-1],
    "sft.batch_size": [0],
    "sft.epochs": [-1.0],
    "sft.eval_steps": [-1],
    "sft.save_steps": [-1],
    "sft.max_tokens_per_pass": [0],
    "sft.optimizer.learning_rate": [0.0],
    "sft.optimizer.warmup_ratio": [1.0],
    "sft.optimizer.min_lr_ratio": [-0.1, 1.1],
    "sft.optimizer.weight_decay": [-0.1],
    "sft.optimizer.betas": [(0.9, 1.0), (-0.1, 0.9)],
    "sft.optimizer.eps": [0.0],
    "sft.optimizer.max_grad_norm": [-1.0],
    "sft.optimizer.max_bad_steps": [0],
    "reward.max_steps": [-1],
    "reward.margin": [-1.0],
    "reward.centering": [-1.0],
    "rlhf.iterations": [-1],
    "rlhf.prompts_per_iteration": [0],
    "rlhf.epochs": [0],
    "rlhf.minibatches": [0],
    "rlhf.max_tokens_per_pass": [0],
    "rlhf.clip_low": [0.0, 1.0],
    "rlhf.clip_high": [0.0],
    "rlhf.dual_clip": [-1.0, 0.5, 1.0],
    "rlhf.value_clip": [-0.1],
    "rlhf.gamma": [-0.1, 1.1],
    "rlhf.lam": [-0.1, 1.1],
    "rlhf.entropy_coef": [-0.1],
    "rlhf.target_kl": [-0.1],
    "rlhf.ptx_coef": [-0.1],
    "rlhf.ema_decay": [-0.1, 1.0],
    "rlhf.critic_warmup": [-1],
    "rlhf.eval_prompts": [-1],
    "rlhf.eval_steps": [-1],
    "rlhf.save_steps": [-1],
    "rlhf.sample_steps": [-1],
    "rlhf.generation.max_new_tokens": [0],
    "rlhf.generation.temperature": [0.0, 1e-7, math.nan],
    "rlhf.generation.samples_per_prompt": [0],
    "rlhf.generation.max_batch": [0],
    "rlhf.generation.kv_bytes": [-1],
    "rlhf.generation.stop_token_ids": [(3, -1)],
    "rlhf.shaping.missing_eos_penalty": [-1.0],
    "rlhf.shaping.overlong_buffer": [-1, 129],
    "rlhf.shaping.overlong_factor": [-1.0],
    "rlhf.shaping.clip": [-1.0],
    "rlhf.kl.coef": [-0.1],
    "rlhf.kl.target": [-0.1],
    "rlhf.kl.horizon": [0],
    "judge.http_timeout": [0.0],
    "judge.http_retries": [-1],
}


@pytest.mark.parametrize(("path", "value"), [(p, v) for p, values in BAD.items() for v in values])
def test_a_value_out_of_range_is_named(path, value):
    section, _, name = path.rpartition(".")
    message = refusal({path: value})
    assert section in message
    assert name in message
    assert "give" in message or "is longer than" in message


def test_no_number_is_taken_without_a_look():
    """Every number has an interval, but for those that are checked against others."""
    together = {
        *("steps", "num_gpus", "zero_stage", "data.weights", "data.split"),
        *("data.max_prompt_tokens", "data.max_length", "model.lora_base_bits"),
    }
    free = {s.path for s in settings().values() if s.kind in (int, float) and not s.within}
    assert free == together


def test_defaults_and_the_ends_of_intervals_are_fine():
    assert build({}) == RunConfig()
    PPOConfig(dual_clip=3.0, value_clip=0.0, gamma=0.0, lam=1.0, max_tokens_per_pass=1)
    OptimizerConfig(betas=(0.0, 0.0), min_lr_ratio=1.0, max_grad_norm=0.0)
    DataConfig(max_heldout=0)


def test_warming_up_a_critic_needs_a_critic_and_leaves_iterations():
    grouped = {"rlhf.advantage": "rloo", "rlhf.generation.samples_per_prompt": 2}
    assert "trains no critic" in refusal({**grouped, "rlhf.critic_warmup": 1})
    leaves_none = refusal({"rlhf.critic_warmup": 3, "rlhf.iterations": 3})
    assert leaves_none.startswith("rlhf.critic_warmup (3) leaves none of the 3 iterations")
    config = build({"rlhf.critic_warmup": 3}).rlhf  # how many there are depends on the data
    with pytest.raises(UserError, match="leaves none of the 2 iterations"):
        config.check_policy_trains(2)


def test_an_adaptive_coefficient_needs_room():
    """A horizon of one iteration's samples moves the coefficient by a fifth at once at most."""
    batch = {"rlhf.prompts_per_iteration": 64, "rlhf.kl.horizon": 63}
    build(batch)  # a fixed coefficient has no horizon
    message = refusal({**batch, "rlhf.kl.target": 6.0})
    assert message.startswith("rlhf.kl.horizon (63) is below the 64 samples of an iteration")
    build({**batch, "rlhf.kl.target": 6.0, "rlhf.kl.horizon": 64})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.lora_alpha", 32.0),
        ("model.lora_dropout", 0.1),
        ("model.lora_target_modules", ("q_proj",)),
        ("model.lora_rslora", True),
        ("model.lora_merge", True),
        ("model.lora_base_bits", 4),
        ("rlhf.generation.merge_adapters", True),
    ],
)
def test_settings_of_adapters_need_adapters(path, value):
    assert "model.lora_r is 0" in refusal({path: value})
    build({path: value, "model.lora_r": 4})


def test_bases_have_few_bits_or_all():
    assert "model.lora_base_bits is 3" in refusal({"model.lora_r": 4, "model.lora_base_bits": 3})
    merging = {"model.lora_r": 4, "rlhf.generation.merge_adapters": True}
    assert "give one of the two" in refusal({**merging, "model.lora_base_bits": 8})


def test_only_frozen_weights_can_be_watched():
    assert "all weights are trained" in refusal({"model.verify_frozen": True})
    for frozen in ({"model.lora_r": 4}, {"model.trainable_layers": 1}):
        build({"model.verify_frozen": True, **frozen})


def test_adapters_need_layers():
    message = refusal({"model.lora_r": 4, "model.lora_target_modules": ()})
    assert message.startswith("model.lora_target_modules is empty")
