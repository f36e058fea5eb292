"""Two ranks train what one does: the same samples, the same losses, in every ZeRO stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.stages.runs import Trainer, check_close, files, summary

pytestmark = pytest.mark.multi_process

# Nothing divides by two: shares, passes and minibatches of unequal size.
UNEVEN = {
    "rlhf.prompts_per_iteration": 9,
    "rlhf.minibatches": 3,
    "sft.batch_size": 7,
    "reward.batch_size": 5,
}


@pytest.fixture(scope="module")
def uneven(trainer: Trainer) -> Trainer:
    return trainer.having(UNEVEN)


@pytest.fixture(scope="module")
def alone(uneven: Trainer, tmp_path_factory: pytest.TempPathFactory):
    return uneven(tmp_path_factory.mktemp("runs") / "alone")


@pytest.mark.parametrize(("stage", "together"), [(2, 1), (3, 1), (3, 2)])
def test_two_ranks_equal_one(uneven, alone, tmp_path, stage, together):
    """Also where both of them generate together."""
    flags = ("--zero-stage", str(stage), "--inference-tp", str(together))
    done = uneven.spawn(tmp_path, "--num-gpus", "2", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    check_close(tmp_path, alone)
    both = summary(tmp_path), summary(alone)
    for stage_name in ("sft", "reward", "rlhf"):
        ours, theirs = (found[stage_name] for found in both)
        assert ours.keys() == theirs.keys()
        assert all(ours[key] == pytest.approx(theirs[key], abs=1e-3) for key in theirs)
    assert files(tmp_path).keys() == files(alone).keys()
    assert answers(tmp_path, "before") == answers(alone, "before")


def answers(output: Path, when: str) -> list[str]:
    rows = (output / "rlhf/samples.jsonl").read_text().splitlines()
    return [json.loads(row)[when]["answer"] for row in rows]


@pytest.mark.slow
def test_options_that_keep_state_on_every_rank(trainer, tmp_path):
    """LoRA, group advantages, EMA and PPO-ptx under ZeRO-3, killed on both ranks and resumed."""
    stateful = trainer.having(
        {
            "model.lora_r": 4,
            "rlhf.advantage": "grpo",
            "rlhf.generation.samples_per_prompt": 2,
            "rlhf.ema_decay": 0.9,
            "rlhf.ptx_coef": 0.5,
        }
    )
    one = stateful(tmp_path / "one")
    two = tmp_path / "two"
    done = stateful.spawn(two, "--num-gpus", "2", "--zero-stage", "3")
    assert done.returncode == 0, done.stderr
    check_close(two, one)
    assert files(two).keys() == files(one).keys()


@pytest.mark.slow
def test_a_killed_run_of_two_ranks_resumes(uneven, alone, tmp_path):
    """SIGKILL of one rank in step 3 stops the other; the metrics go on as if nothing happened."""
    command = ["--num-gpus", "2", "--zero-stage", "2"]
    killed = uneven.spawn(tmp_path, *command, through="tests.stages.kill_after rlhf 3")
    assert killed.returncode == 137
    assert "rank 0 of 2 was ended by SIGKILL" in killed.stderr
    done = uneven.spawn(tmp_path, *command, "--resume")
    assert done.returncode == 0, done.stderr
    check_close(tmp_path, alone)


REWARDS = """
import os
def second_rank_fails(prompts, completions):
    return [float("nan") if os.environ["RANK"] == "1" else 1.0] * len(prompts)
def all_fail(prompts, completions):
    raise ValueError("no idea")
"""


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("second_rank_fails", "returned nan for sample 0 (prompt: "),
        ("all_fail", "raised ValueError: no idea at "),
    ],
)
def test_an_error_is_shown_once(trainer, prepared, tmp_path, name, wanted):
    output = shutil.copytree(prepared, tmp_path / "output")
    (tmp_path / "rewards.py").write_text(REWARDS)
    broken = trainer.having({"judge.rewards": f"{tmp_path}/rewards.py:{name}"})
    done = broken.spawn(output, "--steps", "3", "--num-gpus", "2")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: reward ")
    assert wanted in lines[0]
    assert wanted in (output / "run.log").read_text()
    assert files(output) == files(prepared)
