"""Step 3 without a critic, and the settings that change how it steps."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from hybrid_engine.config import KLConfig, OptimizerConfig
from hybrid_engine.engine.optim import learning_rate
from hybrid_engine.stages.update import Updater
from tests.stages.runs import column, files, metrics

GROUP = 4


@pytest.fixture
def experiences(monkeypatch: pytest.MonkeyPatch) -> list:
    """What the updates of the run were given."""
    seen = []
    update = Updater.__call__

    def watch(self, experience, *args, **kwargs):
        seen.append(experience)
        return update(self, experience, *args, **kwargs)

    monkeypatch.setattr(Updater, "__call__", watch)
    return seen


def expected_advantages(kind: str, scores: torch.Tensor) -> torch.Tensor:
    """By the papers' formulas, from the scores [groups, GROUP] of whole answers, in fp64."""
    centred = scores - scores.mean(1, keepdim=True)
    if kind == "grpo":
        return centred / scores.std(1, keepdim=True)
    if kind == "rloo":
        return centred * GROUP / (GROUP - 1)
    return centred


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "reinforce_baseline"])
def test_answers_to_a_prompt_compete(trainer, prepared, tmp_path, experiences, kind):
    output = shutil.copytree(prepared, tmp_path / "output")
    grouped = trainer.having(
        {"rlhf.advantage": kind, "rlhf.generation.samples_per_prompt": GROUP, "rlhf.iterations": 2}
    )
    grouped(output, "--steps", "3")

    lines = metrics(output, "rlhf")
    assert column(lines, "first_log_ratio") == [0.0, 0.0]
    assert all("value_loss" not in line and "zero_std_groups" in line for line in lines)
    assert not (output / "rlhf/critic").exists()
    assert files(output)["rlhf/actor/model.safetensors"] != files(output)["sft/model.safetensors"]
    for experience in experiences:
        assert len(experience) == 8 * GROUP
        assert experience.prompts[0] == experience.prompts[GROUP - 1] != experience.prompts[GROUP]
        scores = experience.rewards.double().sum(1).view(-1, GROUP)
        wanted = expected_advantages(kind, scores).flatten()[:, None] * experience.mask
        if kind == "reinforce_baseline":
            inside = wanted[experience.mask]
            wanted = ((wanted - inside.mean()) / inside.std()) * experience.mask
        torch.testing.assert_close(experience.advantages.double(), wanted, rtol=1e-4, atol=1e-5)


def test_one_answer_a_prompt_cannot_compete(trainer, tmp_path, capsys):
    trainer.having({"rlhf.advantage": "grpo"})(tmp_path / "output", expect=2)
    assert "samples_per_prompt to 2 or more" in capsys.readouterr().err


def test_a_tiny_kl_target_ends_the_epochs(trainer, prepared, tmp_path):
    output = shutil.copytree(prepared, tmp_path / "output")
    trainer.having({"rlhf.epochs": 3, "rlhf.target_kl": 1e-9})(output, "--steps", "3")
    assert column(metrics(output, "rlhf"), "epochs") == [1, 1, 1]


def test_the_critic_may_learn_first(trainer, prepared, tmp_path):
    """While it does, the policy stays where it was: the third rollout is still the reference's."""
    output = shutil.copytree(prepared, tmp_path / "output")
    warming = {"rlhf.critic_warmup": 2, "rlhf.kl.target": 6.0}
    trainer.having(warming)(output, "--steps", "3")
    lines = metrics(output, "rlhf")
    assert [("policy_loss" in m, "value_loss" in m) for m in lines] == [
        (False, True),
        (False, True),
        (True, True),
    ]
    assert column(lines, "kl") == [0.0, 0.0, 0.0]
    assert lines[2]["first_log_ratio"] == 0.0
    # Two minibatches an iteration: the policy's schedule is that of its own two steps.
    optimizer = OptimizerConfig(learning_rate=1e-3)
    assert lines[2]["actor_lr"] == learning_rate(1, 2, optimizer)
    assert lines[2]["critic_lr"] == learning_rate(5, 6, optimizer)
    # A policy at rest has no KL, which is no reason to make leaving cheaper.
    assert column(lines, "kl_coef") == [KLConfig().coef] * 3


def test_kl_by_k3_is_that_of_the_tokens(trainer, prepared, tmp_path, experiences):
    output = shutil.copytree(prepared, tmp_path / "output")
    trainer(output, "--steps", "3")
    lines = metrics(output, "rlhf")
    assert lines[0]["kl_k3"] == 0.0
    assert lines[-1]["kl_k3"] > 0.0
    for line, experience in zip(lines, experiences, strict=True):
        d = (experience.old_logprobs - experience.ref_logprobs)[experience.mask].double()
        wanted = float((torch.exp(-d) - 1 + d).mean())
        assert line["kl_k3"] == pytest.approx(wanted, rel=1e-4, abs=1e-9)


def test_a_nan_is_not_agreement(trainer, prepared, tmp_path, monkeypatch):
    """Of several passes one has a nan: the largest log ratio must not be that of the others."""
    ratios = iter([0.0, math.nan, 0.0, *[0.0] * 100])
    policy_pass = Updater._policy_pass

    def disturbed(*args):
        policy_pass(*args)
        return next(ratios)

    monkeypatch.setattr(Updater, "_policy_pass", disturbed)
    output = shutil.copytree(prepared, tmp_path / "output")
    trainer.having({"rlhf.max_tokens_per_pass": 32})(output, "--steps", "3")
    first = [m["first_log_ratio"] for m in metrics(output, "rlhf")]
    assert first[0] is None or math.isnan(first[0])
    assert first[1:] == [0.0, 0.0]


def test_without_movement_the_average_is_the_actor(trainer, prepared, tmp_path):
    """With a learning rate of almost nothing; an average of decay 0.9 of equal values is equal."""
    output = shutil.copytree(prepared, tmp_path / "output")
    still = {"rlhf.actor_optimizer.learning_rate": 1e-30, "rlhf.ema_decay": 0.9}
    trainer.having(still)(output, "--steps", "3")
    models = files(output)
    actor = models["rlhf/actor/model.safetensors"]
    assert actor == models["rlhf/actor_ema/model.safetensors"] == models["sft/model.safetensors"]


def test_demonstrations_pull_the_policy_back(trainer, prepared, tmp_path):
    """The language-modelling loss falls when it is mixed in strongly."""
    output = shutil.copytree(prepared, tmp_path / "output")
    settings = {"rlhf.ptx_coef": 10.0, "rlhf.iterations": 6, "rlhf.max_tokens_per_pass": 4096}
    trainer.having(settings)(output, "--steps", "3")
    losses = column(metrics(output, "rlhf"), "ptx_loss")
    assert losses[-1] < 0.9 * losses[0]
