"""A run that is killed and resumed equals one that was not, bit for bit, in metrics and models."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from hybrid_engine import train_rlhf
from hybrid_engine.stages.loop import StageLoop
from tests.stages.runs import Trainer, files, metrics, summary

# Everything that carries state from one iteration to the next.
STATEFUL = {
    "rlhf.iterations": 5,
    "rlhf.epochs": 2,
    "rlhf.critic_warmup": 1,
    "rlhf.target_kl": 2e-4,
    "rlhf.ema_decay": 0.9,
    "rlhf.ptx_coef": 0.5,
    "rlhf.kl.target": 0.5,
    "rlhf.kl.horizon": 50,
    "rlhf.shaping.normalize": "standardize",
    "rlhf.generation.samples_per_prompt": 2,
    "rlhf.eval_steps": 1,
    "sft.max_steps": 5,
    "reward.max_steps": 5,
}


@pytest.fixture(scope="module")
def stateful(trainer: Trainer) -> Trainer:
    return trainer.having(STATEFUL)


@pytest.fixture(scope="module")
def uninterrupted(stateful: Trainer, tmp_path_factory: pytest.TempPathFactory):
    return stateful(tmp_path_factory.mktemp("runs") / "uninterrupted")


def test_the_run_moves_all_of_its_state(uninterrupted):
    """Otherwise the comparisons below would show nothing."""
    lines = metrics(uninterrupted, "rlhf")
    # The first iteration warms the critic up, and leaves the coefficient alone.
    assert len({line["kl_coef"] for line in lines[1:]}) == len(lines) - 1
    assert {line["epochs"] for line in lines} == {1, 2}
    assert all("ptx_loss" in line for line in lines[1:])
    assert "policy_loss" not in lines[0]
    models = files(uninterrupted)
    names = [f"rlhf/{name}/model.safetensors" for name in ("actor", "actor_ema")]
    assert len({models[name] for name in [*names, "sft/model.safetensors"]}) == 3


@pytest.mark.multi_process
@pytest.mark.parametrize("stage, after", [("sft", 3), ("reward", 3), ("rlhf", 3)])
def test_a_killed_run_resumes_to_the_same_bits(stateful, uninterrupted, tmp_path, stage, after):
    through = f"tests.stages.kill_after {stage} {after}"
    killed = stateful.spawn(tmp_path, through=through)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert metrics(tmp_path, stage)[-1]["iteration"] == after
    stateful(tmp_path, "--resume")
    assert metrics(tmp_path) == metrics(uninterrupted)
    assert summary(tmp_path) == summary(uninterrupted)
    assert files(tmp_path) == files(uninterrupted)


@pytest.mark.multi_process
def test_resume_needs_no_other_word(stateful, uninterrupted, tmp_path):
    """The settings are those that the interrupted run wrote down."""
    killed = stateful.spawn(tmp_path, through="tests.stages.kill_after rlhf 1")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert train_rlhf.main(["--resume", "--output-dir", str(tmp_path)]) == 0
    assert metrics(tmp_path) == metrics(uninterrupted)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch):
    """Trains until right after the first checkpoint of a stage, where Ctrl-C comes."""

    def train(trainer: Trainer, output: Path, *flags: str) -> None:
        save = StageLoop._save

        def save_and_stop(self, step):
            save(self, step)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(StageLoop, "_save", save_and_stop)
            trainer(output, *flags, expect=130)

    return train


@pytest.mark.parametrize(
    "settings",
    [
        {"model.lora_r": 4, "model.lora_dropout": 0.2, "model.lora_merge": True},
        {"model.trainable_layers": 1},
        {"zero_stage": 1},
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"rlhf.advantage": "rloo", "rlhf.generation.samples_per_prompt": 2},
    ],
    ids=str,
)
def test_every_way_of_training_resumes_to_the_same_bits(trainer, tmp_path, interrupted, settings):
    way = trainer.having({**settings, "rlhf.ema_decay": 0.9})
    whole = way(tmp_path / "whole")
    interrupted(way, tmp_path / "parts")  # in step 1
    for _ in range(2):  # in step 2 and in step 3
        interrupted(way, tmp_path / "parts", "--resume")
    way(tmp_path / "parts", "--resume")
    assert metrics(tmp_path / "parts") == metrics(whole)
    assert files(tmp_path / "parts") == files(whole)


def test_seconds_of_a_resumed_step_include_those_before(trainer, tmp_path, interrupted):
    interrupted(trainer, tmp_path, "--steps", "1")
    state = json.loads(next((tmp_path / "checkpoints/sft").glob("*/state.json")).read_text())
    before = state["components"]["spent"]
    trainer(tmp_path, "--resume")
    after = json.loads((tmp_path / "summary.json").read_text())["sft"]
    assert after["seconds"] > before["seconds"] > 0
    assert after["phase_seconds"]["train"] > before["phase_seconds"]["train"] > 0


def test_resuming_with_other_settings_is_said(trainer, tmp_path, interrupted, capsys):
    interrupted(trainer, tmp_path, "--steps", "1")
    capsys.readouterr()
    trainer.having({"seed": 7})(tmp_path, "--resume")
    shown = capsys.readouterr().out
    assert shown.count("warning: ") == 1
    assert "warning: resuming with another seed: 7, was 0" in shown


@pytest.mark.parametrize(
    "settings, wanted",
    [
        ({"model.dtype": "bfloat16"}, "the parameters' dtype was float32, now it is bfloat16"),
        ({"model.trainable_layers": 1}, "decoder.embed_tokens.weight was trained, and now is not"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    trainer, tmp_path, interrupted, capsys, settings, wanted
):
    interrupted(trainer, tmp_path, "--steps", "1")
    capsys.readouterr()
    trainer.having(settings)(tmp_path, "--resume", expect=2)
    error = capsys.readouterr().err
    assert error.startswith("error: cannot resume policy")
    assert wanted in error
    assert error.count("\n") == 1
