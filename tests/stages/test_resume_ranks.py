"""A run that was killed on two ranks goes on with another number of them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.stages.runs import Trainer, check_close, files, metrics
from tests.stages.test_kill import STATEFUL

pytestmark = pytest.mark.multi_process

KILLED = 128 + signal.SIGKILL
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def stateful(trainer: Trainer) -> Trainer:
    # A critic that learns fast magnifies what sums round differently on other numbers of ranks.
    return trainer.having(STATEFUL | {"rlhf.critic_optimizer.learning_rate": 1e-4})


@pytest.fixture(scope="module")
def alone(stateful: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, uninterrupted."""
    return stateful(tmp_path_factory.mktemp("runs") / "alone")


def go_on(trainer: Trainer, output: Path, ranks: int, *flags: str, die: str = "") -> None:
    """Trains on so many ranks; `die` is the stage and the line of metrics where the first of them
    is killed.
    """
    through = f"tests.stages.kill_after {die}" if die else "hybrid_engine.train_rlhf"
    # Always said: --resume alone takes the number from the run that is resumed.
    done = trainer.spawn(output, "--num-gpus", str(ranks), *flags, through=through)
    expected = KILLED if die else 0
    assert done.returncode == expected, done.stderr


def test_killed_on_two_ranks_resumed_on_one(stateful, alone, tmp_path):
    """Step 3, with all of its state: actor, critic, average, schedules, KL controller, moments."""
    go_on(stateful, tmp_path, 2, "--zero-stage", "2", die="rlhf 3")
    assert metrics(tmp_path)[-1]["iteration"] == 3
    stateful(tmp_path, "--resume", "--num-gpus", "1", "--zero-stage", "2")
    check_close(tmp_path, alone, TOLERANCE)
    assert files(tmp_path).keys() == files(alone).keys()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("resumed", [(1, 4, 2), (4, 1, 4)], ids=str)
def test_every_step_on_another_number_of_ranks(stateful, alone, tmp_path, stage, resumed):
    """Killed in each of the three steps, each time resumed on a number of its own."""
    flags = ("--zero-stage", str(stage))
    go_on(stateful, tmp_path, 2, *flags, die="sft 3")
    go_on(stateful, tmp_path, resumed[0], "--resume", *flags, die="reward 3")
    go_on(stateful, tmp_path, resumed[1], "--resume", *flags, die="rlhf 3")
    go_on(stateful, tmp_path, resumed[2], "--resume", *flags)
    check_close(tmp_path, alone, TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [(), ("--lora-r", "4", "--lora-dropout", "0.2")], ids=len)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_as_many_ranks_resume_to_the_same_bits(stateful, tmp_path, stage, adapters):
    """With the random states of every rank, which dropout reads."""
    flags = ("--zero-stage", str(stage), *adapters)
    go_on(stateful, tmp_path / "whole", 2, *flags)
    go_on(stateful, tmp_path / "parts", 2, *flags, die="sft 3")
    go_on(stateful, tmp_path / "parts", 2, "--resume", *flags, die="reward 3")
    go_on(stateful, tmp_path / "parts", 2, "--resume", *flags, die="rlhf 3")
    go_on(stateful, tmp_path / "parts", 2, "--resume", *flags)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
