"""Checkpoints of two ranks: one directory, every rank's shard, the same continuation."""

from pathlib import Path

import pytest
import torch

from hybrid_engine.checkpoint import Checkpoints, RunState
from hybrid_engine.distributed.collectives import rank
from hybrid_engine.rl.ema import EMA
from tests.distributed.ranks import results_of

pytestmark = pytest.mark.multi_process


def save_and_continue(directory):
    """ZeRO-2 and 3: what follows the save, uninterrupted and restored into a new engine."""
    from tests.test_checkpoint import everything, make_engine, train

    found = {}
    for stage in (2, 3):
        checkpoints = Checkpoints(Path(directory, f"zero-{stage}"))
        engine = make_engine(stage)
        ema = EMA(engine.local_parameters(), 0.9)
        torch.manual_seed(rank())
        train(engine, ema, 2)
        checkpoints.save(2, RunState("sft", 2), {"policy": engine}, ema.tensors())
        norms = train(engine, ema, 2)
        expected = everything(engine, ema)
        again = make_engine(stage)
        other = EMA(again.local_parameters(), 0.9)
        _, tensors = checkpoints.restore(checkpoints.latest(), {"policy": again})
        other.load_tensors(tensors)
        same_norms = train(again, other, 2) == norms
        after = everything(again, other)
        found[stage] = [same_norms, all(torch.equal(after[n], t) for n, t in expected.items())]
    return found


def test_two_ranks_continue_bit_exactly(tmp_path):
    assert (
        results_of(f"{__name__}:save_and_continue", 2, tmp_path)
        == [{"2": [True, True], "3": [True, True]}] * 2
    )
    for stage in (2, 3):
        saved = tmp_path / f"zero-{stage}" / "step-000002"
        assert {p.name for p in saved.glob("tensors-*")} == {
            "tensors-rank0.safetensors",
            "tensors-rank1.safetensors",
        }
        assert len(list(saved.rglob("*optim_states.pt"))) == 2
