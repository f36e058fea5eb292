"""Checkpoints: bit-exact continuation, and a whole one left behind by a kill at any moment."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hybrid_engine.checkpoint import Checkpoints, RunState
from hybrid_engine.config import OptimizerConfig
from hybrid_engine.errors import UserError
from hybrid_engine.rl.ema import EMA

ROOT = Path(__file__).resolve().parents[1]


def state_at(iteration: int) -> RunState:
    return RunState(
        "rlhf", iteration, metrics_lines=2 * iteration, components={"kl": {"coef": 0.1 / 3}}
    )


def make_engine(stage: int, name: str = "policy", frozen_seed: int = 0):
    from hybrid_engine.engine.train_engine import TrainEngine

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    with torch.no_grad():
        module[0].weight.normal_(generator=torch.Generator().manual_seed(frozen_seed))
    module[0].weight.requires_grad_(False)
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
    return TrainEngine(module, config, 10, {"zero_optimization": {"stage": stage}}, name)


def train(engine, ema: EMA, steps: int) -> list[float]:
    """Steps on random data from torch's global generator, which a checkpoint must restore."""
    norms = []
    for _ in range(steps):
        for _ in range(2):
            x = torch.randn(4, 6)
            engine.backward(engine(x).square().sum(), 8)
        norms.append(engine.step())
        ema.update(engine.local_parameters())
    return norms


def everything(engine, ema: EMA) -> dict[str, torch.Tensor]:
    return {
        **{f"p/{k}": v.clone() for k, v in engine.gathered_state_dict().items()},
        **{f"ema/{k}": v.clone() for k, v in ema.tensors().items()},
    }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_continuation_is_bit_exact(tmp_path, stage):
    checkpoints = Checkpoints(tmp_path)
    engine = make_engine(stage)
    ema = EMA(engine.local_parameters(), 0.9)
    train(engine, ema, 3)
    checkpoints.save(3, state_at(3), {"policy": engine}, ema.tensors())
    expected_norms = train(engine, ema, 4)
    expected = everything(engine, ema)

    torch.manual_seed(99)
    again = make_engine(stage)
    other = EMA(again.local_parameters(), 0.9)
    path = checkpoints.latest()
    state, tensors = checkpoints.restore(path, {"policy": again})
    other.load_tensors(tensors)
    assert state == state_at(3)
    assert again.steps == 3
    assert train(again, other, 4) == expected_norms
    found = everything(again, other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert again.lr == engine.lr


def test_frozen_weights_are_left_out_and_must_be_the_same(tmp_path):
    engine = make_engine(1)
    engine.save(tmp_path)
    sizes = sum(f.stat().st_size for f in tmp_path.rglob("*.pt"))
    assert sizes > 0
    for file in tmp_path.rglob("*model_states.pt"):
        assert "0.weight" not in torch.load(file, weights_only=False)["module"]
    with pytest.raises(UserError, match="its checksum of the frozen weights was"):
        make_engine(1, frozen_seed=1).load(tmp_path)
    with pytest.raises(UserError, match="its ZeRO stage was 1, now it is 2"):
        make_engine(2).load(tmp_path)


def test_random_states_continue(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    random.gauss(0, 1), np.random.standard_normal()  # leave half a pair cached in each
    checkpoints.save(1, state_at(1))

    def draw():
        return (
            [random.gauss(0, 1), random.random()],
            np.random.standard_normal(3).tolist(),
            torch.randn(3).tolist(),
        )

    expected = draw()
    checkpoints.restore(checkpoints.latest())
    assert draw() == expected


def test_old_ones_are_pruned_and_latest_moves(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    for step in (1, 2, 10):
        path = checkpoints.save(step, state_at(step))
        assert checkpoints.latest() == path == tmp_path / f"step-{step:06d}"
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000002", "step-000010"]
    checkpoints.save(2, state_at(3))  # a resumed run comes by again
    assert checkpoints.read_state(checkpoints.latest()).iteration == 3
    checkpoints.clear()
    assert checkpoints.latest() is None
    assert not tmp_path.exists()


def test_a_damaged_pointer_is_explained(tmp_path):
    (tmp_path / "latest").write_text("step-000007")
    with pytest.raises(UserError, match="step-000007, which is missing or incomplete"):
        Checkpoints(tmp_path).latest()


def test_an_unwritable_directory_is_explained(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="cannot write checkpoints into"):
        Checkpoints(blocked / "checkpoints").save(1, state_at(1))


def test_leftovers_of_a_kill_are_swept(tmp_path):
    (tmp_path / "step-000005.partial").mkdir()
    (tmp_path / "latest.partial").write_text("half")
    Checkpoints(tmp_path).save(6, state_at(6))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000006"]


SAVE_FOREVER = """
import sys, torch
from hybrid_engine.checkpoint import Checkpoints, RunState
checkpoints = Checkpoints(sys.argv[1], keep=1)
for step in range(int(sys.argv[2]), 10**6):
    values = torch.full((50_000,), float(step))
    checkpoints.save(step, RunState("rlhf", step, components={"step": step}), tensors={"x": values})
    print(step, flush=True)
"""


def test_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """SIGKILL in a tight save loop, each time a little later; what is left must load and agree
    with itself."""
    directory = tmp_path / "checkpoints"
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    reached = 0
    for attempt in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(directory), str(reached + 1)],
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
        )
        for _ in range(3):
            announced = int(child.stdout.readline())
        time.sleep(0.0007 * attempt)  # any moment will do: this only moves it about
        child.send_signal(signal.SIGKILL)
        child.wait()
        checkpoints = Checkpoints(directory)
        state, tensors = checkpoints.restore(checkpoints.latest())
        assert state.iteration >= announced > reached
        assert state.components == {"step": state.iteration}
        assert torch.equal(tensors["x"], torch.full((50_000,), float(state.iteration)))
        reached = state.iteration


def test_our_own_state_is_json_and_safetensors(tmp_path):
    path = Checkpoints(tmp_path).save(1, state_at(1), tensors={"a": torch.ones(2)})
    assert sorted(p.suffix for p in path.iterdir()) == [".json", ".json", ".safetensors"]
    assert json.loads((path / "state.json").read_text())["stage"] == "rlhf"


class Payload:
    """A pickle that runs a program when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_a_tampered_file_is_not_executed(tmp_path):
    engine = make_engine(1)
    engine.save(tmp_path)
    target = next(tmp_path.rglob("*optim_states.pt"))
    torch.save({"optimizer_state_dict": Payload(tmp_path / "executed")}, target)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        make_engine(1).load(tmp_path)
    assert not (tmp_path / "executed").exists()
