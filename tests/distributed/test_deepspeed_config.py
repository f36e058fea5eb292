"""The user's DeepSpeed JSON over our defaults, under what we own."""

import json

import pytest
import torch
from torch import nn

from hybrid_engine.config import OptimizerConfig
from hybrid_engine.engine.deepspeed_config import complete, read_user_json, zero_stage
from hybrid_engine.engine.deepspeed_limits import check_supported
from hybrid_engine.engine.train_engine import TrainEngine
from hybrid_engine.errors import UserError


def write(tmp_path, settings):
    path = tmp_path / "ds.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return path


def test_user_settings_win_over_defaults_key_by_key(tmp_path):
    user = read_user_json(
        write(tmp_path, {"zero_optimization": {"stage": 2}, "wall_clock_breakdown": True})
    )
    settings = complete(user, torch.float32, world_size=3, max_grad_norm=0.5)
    assert zero_stage(settings) == 2
    assert settings["zero_optimization"]["overlap_comm"] is False
    assert settings["wall_clock_breakdown"] is True
    assert settings["gradient_clipping"] == 0.5
    assert settings["train_batch_size"] == 3


def test_the_bare_optimizer_is_clipped_by_us():
    assert complete({}, torch.float32, 1, 0.5)["gradient_clipping"] == 0.0
    assert complete({}, torch.bfloat16, 1, 0.5)["gradient_clipping"] == 0.5


def test_auto_means_ours(tmp_path):
    """The file that transformers' documentation shows."""
    user = read_user_json(
        write(
            tmp_path,
            {
                "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
                "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
                "bf16": {"enabled": "auto"},
                "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
                "gradient_accumulation_steps": "auto",
                "train_batch_size": "auto",
                "gradient_clipping": "auto",
            },
        )
    )
    assert user == {"bf16": {}, "zero_optimization": {"stage": 3}}
    assert complete(user, torch.bfloat16, 1, 1.0)["bf16"] == {"enabled": True}


@pytest.mark.parametrize(
    "settings, message",
    [
        ('{"a": 1,\n "b" 2}', r"ds.json:2:6: not valid JSON"),
        ("[1]", "expected a JSON object with DeepSpeed settings, got list"),
        ({"train_batch_size": 8}, 'remove "train_batch_size": set --sft.batch-size'),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}},
            'remove "scheduler"',
        ),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, 'remove "optimizer"'),
        ({"optimizer": {"type": "Lamb"}}, 'remove "optimizer"'),
        ({"gradient_clipping": 1.0}, "--STEP.optimizer.max-grad-norm"),
    ],
)
def test_mistakes_are_explained(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        read_user_json(write(tmp_path, settings))


@pytest.mark.parametrize(
    "zero, message",
    [
        ({"zero_quantized_weights": True}, "zero_quantized_weights to True: DeepSpeed quantizes"),
        ({"zero_quantized_gradients": True}, "zero_quantized_gradients to True"),
        ({"zero_quantized_nontrainable_weights": True}, "zero_quantized_nontrainable_weights to"),
        ({"offload_optimizer": {"device": "nvme"}}, "offload_optimizer.device to nvme: opt.*cpu"),
        ({"offload_param": {"device": "nvme"}}, "offload_param.device to nvme: generation"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offload_optimizer.ratio to 0.5"),
        ({"stage": 1, "overlap_comm": True}, "overlap_comm to True"),
        ({"stage": 2, "round_robin_gradients": True}, "round_robin_gradients to True"),
        ({"stage3_module_granularity_threshold": 5}, "stage3_module_granularity_threshold to 5"),
        ({"mics_shard_size": 2}, "mics_shard_size to 2: DeepSpeed has removed it"),
    ],
)
def test_what_cannot_be_used_is_refused(zero, message):
    """Instead of failing later: each of these ends in an exception of DeepSpeed's, or in ours."""
    settings = {"zero_optimization": {"stage": 3, **zero}}
    with pytest.raises(UserError, match=r"configuration sets zero_optimization\." + message):
        TrainEngine(nn.Linear(2, 1), OptimizerConfig(), 10, settings)


def test_what_can_be_used_is_not_refused():
    offload = {"device": "cpu", "ratio": 1.0, "pin_memory": True}
    for stage in (2, 3):
        zero = {"stage": stage, "offload_optimizer": offload, "overlap_comm": True}
        check_supported({"zero_optimization": zero}, "cpu")
    check_supported({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "cuda")
    check_supported({}, "cpu")


def test_a_missing_file_is_explained(tmp_path):
    with pytest.raises(UserError, match="cannot read the DeepSpeed configuration"):
        read_user_json(tmp_path / "none.json")


def test_contradicting_precision_is_refused():
    with pytest.raises(UserError, match='"bf16": {"enabled": true} but the parameters are float32'):
        complete({"bf16": {"enabled": True}}, torch.float32, 1, 1.0)
    with pytest.raises(UserError, match="stage is 4"):
        complete({"zero_optimization": {"stage": 4}}, torch.float32, 1, 1.0)
