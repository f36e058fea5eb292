"""Checkpoints: bit-exact continuation, and a whole one left behind by a kill at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from hybrid_engine.checkpoint import Checkpoints, RunState
from hybrid_engine.config import OptimizerConfig
from hybrid_engine.distributed.parts import Part
from hybrid_engine.errors import UserError
from hybrid_engine.rl.ema import EMA

ROOT = Path(__file__).resolve().parents[1]


def state_at(iteration: int) -> RunState:
    return RunState(
        "rlhf", iteration, metrics_lines=2 * iteration, components={"kl": {"coef": 0.1 / 3}}
    )


def make_engine(
    stage: int,
    *,
    frozen_seed: int = 0,
    out: int = 3,
    freeze: str = "",
    dtype: torch.dtype = torch.float32,
    settings: dict | None = None,
):
    from hybrid_engine.engine.train_engine import TrainEngine

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, out))
    with torch.no_grad():
        module[0].weight.normal_(generator=torch.Generator().manual_seed(frozen_seed))
    module[0].weight.requires_grad_(False)
    if freeze:
        module.get_parameter(freeze).requires_grad_(False)
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
    zero = {"stage": stage, **(settings or {}).get("zero_optimization", {})}
    merged = {**(settings or {}), "zero_optimization": zero}
    return TrainEngine(module.to(dtype), config, 10, merged, "policy")


def snapshot(engine) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in engine.gathered_state_dict().items()}


def train(engine, ema: EMA, steps: int) -> list[float]:
    """Steps on random data from torch's global generator, which a checkpoint must restore."""
    norms = []
    for _ in range(steps):
        for _ in range(2):
            x = torch.randn(4, 6, dtype=next(engine.module.parameters()).dtype)
            engine.backward(engine(x).square().sum(), 8)
        norms.append(engine.step())
        ema.update(engine.local_parameters())
    return norms


def everything(engine, ema: EMA) -> dict[str, torch.Tensor]:
    return {
        **{f"p/{k}": v.clone() for k, v in engine.gathered_state_dict().items()},
        **{f"ema/{k}": v.clone() for k, v in ema.averages.items()},
    }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_continuation_is_bit_exact(tmp_path, stage):
    checkpoints = Checkpoints(tmp_path)
    engine = make_engine(stage)
    ema = EMA(engine.local_parameters(), 0.9)
    train(engine, ema, 3)
    checkpoints.save(3, state_at(3), {"policy": engine}, engine.parts(ema.averages))
    expected_norms = train(engine, ema, 4)
    expected = everything(engine, ema)

    torch.manual_seed(99)
    again = make_engine(stage)
    other = EMA(again.local_parameters(), 0.9)
    path = checkpoints.latest()
    state = checkpoints.restore(path, {"policy": again}, again.parts(other.averages))
    assert state == state_at(3)
    assert again.steps == 3
    assert train(again, other, 4) == expected_norms
    found = everything(again, other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert again.lr == engine.lr


@pytest.mark.parametrize("before, after", [(0, 3), (3, 1), (2, 0)])
def test_continuation_in_another_zero_stage(tmp_path, before, after):
    engine = make_engine(before)
    train(engine, EMA({}, 0.9), 3)
    engine.save(tmp_path)
    torch.manual_seed(1)
    expected = train(engine, EMA({}, 0.9), 3)
    again = make_engine(after)
    again.load(tmp_path)
    torch.manual_seed(1)
    assert train(again, EMA({}, 0.9), 3) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "stage, settings",
    [
        (0, {}),
        (1, {}),
        (1, {"data_types": {"grad_accum_dtype": "fp32"}}),
        (2, {}),
        (2, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
        (3, {}),
        (3, {"zero_optimization": {"stage3_param_persistence_threshold": 0}}),
    ],
)
def test_bfloat16_continues_from_its_fp32_values(tmp_path, stage, settings):
    options = {"dtype": torch.bfloat16, "settings": settings}
    engine = make_engine(stage, **options)
    train(engine, EMA({}, 0.9), 3)
    engine.save(tmp_path)
    torch.manual_seed(1)
    expected = train(engine, EMA({}, 0.9), 3), snapshot(engine)
    again = make_engine(stage, **options)
    again.load(tmp_path)
    torch.manual_seed(1)
    assert train(again, EMA({}, 0.9), 3) == expected[0]
    assert all(torch.equal(snapshot(again)[name], t) for name, t in expected[1].items())


def test_before_the_first_step_there_is_no_more_to_save_than_weights(tmp_path):
    engine = make_engine(0)
    engine.save(tmp_path)
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 2500
    train(engine, EMA({}, 0.9), 2)
    engine.load(tmp_path)
    fresh = make_engine(0)
    torch.manual_seed(1)
    again = train(engine, EMA({}, 0.9), 2)
    torch.manual_seed(1)
    assert train(fresh, EMA({}, 0.9), 2) == again


def test_frozen_weights_are_left_out_and_must_be_the_same(tmp_path):
    engine = make_engine(1)
    engine.save(tmp_path)
    with safe_open(tmp_path / "part-00000.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["value/0.bias", "value/2.bias", "value/2.weight"]
    with pytest.raises(UserError, match="the checksum of the frozen weights was"):
        make_engine(1, frozen_seed=1).load(tmp_path)


@pytest.mark.parametrize(
    "change, wanted",
    [
        ({"out": 4}, r"2\.weight had the shape \[3, 9\], and now has \[4, 9\]"),
        ({"dtype": torch.bfloat16}, "the parameters' dtype was float32, now it is bfloat16"),
        ({"freeze": "2.bias"}, r"2\.bias was trained, and now is not"),
    ],
)
def test_what_differs_is_named(tmp_path, change, wanted):
    make_engine(0).save(tmp_path)
    with pytest.raises(UserError, match=rf"cannot resume policy from .*: {wanted}; resume with"):
        make_engine(0, **change).load(tmp_path)


def test_a_model_that_was_not_trained_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot resume policy: there is no .*train_state.json"):
        make_engine(0).load(tmp_path)


def test_averages_that_were_not_kept_are_named(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    engine = make_engine(0)
    ema = EMA(engine.local_parameters(), 0.9)
    checkpoints.save(1, state_at(1), {"policy": engine})
    with pytest.raises(UserError, match="no averages of the weights.*rlhf.ema_decay"):
        checkpoints.restore(checkpoints.latest(), {}, engine.parts(ema.averages))


def test_damaged_files_are_named(tmp_path):
    make_engine(0).save(tmp_path)
    file = tmp_path / "part-00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="part-00000.safetensors is damaged"):
        make_engine(0).load(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="part-00000.safetensors is missing"):
        make_engine(0).load(tmp_path)


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
from hybrid_engine.distributed.parts import Part
checkpoints = Checkpoints(sys.argv[1], keep=1)
for step in range(int(sys.argv[2]), 10**6):
    values = {"x": Part(0, torch.full((50_000,), float(step)))}
    checkpoints.save(step, RunState("rlhf", step, components={"step": step}), tensors=values)
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
        x = torch.zeros(50_000)
        state = checkpoints.restore(checkpoints.latest(), tensors={"x": Part(0, x)})
        assert state.iteration >= announced > reached
        assert state.components == {"step": state.iteration}
        assert torch.equal(x, torch.full((50_000,), float(state.iteration)))
        reached = state.iteration


def test_all_of_it_is_json_and_safetensors(tmp_path):
    """Nothing of a checkpoint can be made to run a program when it is read."""
    engine = make_engine(1)
    ema = EMA(engine.local_parameters(), 0.9)
    train(engine, ema, 1)
    averages = engine.parts(ema.averages)
    path = Checkpoints(tmp_path).save(1, state_at(1), {"policy": engine}, averages)
    found = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    assert found == [
        "policy/part-00000.safetensors",
        "policy/train_state.json",
        "rng-00000.json",
        "state.json",
        "tensors/part-00000.safetensors",
    ]
    assert json.loads((path / "state.json").read_text())["stage"] == "rlhf"
