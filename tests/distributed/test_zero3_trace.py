"""What ZeRO-3 keeps of gathered weights: from forward to backward, whatever ran before, as much as
the plan says; and nothing of a pass without one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybrid_engine.config import OptimizerConfig
from hybrid_engine.distributed.collectives import rank
from hybrid_engine.engine import TrainEngine
from hybrid_engine.models import load_causal_lm, pack, response_rows
from hybrid_engine.plan.training import Zero
from tests.distributed.ranks import results_of
from tests.models.peers import ragged, save_causal

pytestmark = pytest.mark.multi_process

ZERO_3 = {"stage": 3, "stage3_param_persistence_threshold": 100}


def gathered(engine: TrainEngine) -> int:
    """Elements that are there in whole."""
    return sum(p.numel() for p in engine.module.parameters())


def evaluated_first(directory: str) -> dict[str, list[int]]:
    """An evaluation of two passes, four steps of one pass each, an evaluation: what was gathered
    after each.
    """
    model = load_causal_lm(directory)
    engine = TrainEngine(model, OptimizerConfig(), 9, {"zero_optimization": ZERO_3})
    persistent = sum(p.ds_numel for p in model.parameters() if p.ds_persist)
    batch = pack(ragged(rank()))
    rows, targets = response_rows(batch, [1] * batch.num_sequences)
    with torch.no_grad():
        for _ in range(2):
            engine(batch, rows, targets)
    forwards = []
    for _ in range(4):
        logprobs = engine(batch, rows, targets).logprobs
        engine.release_gathered()  # a backward is to come
        forwards.append(gathered(engine))
        engine.backward(-logprobs.sum(), 100)
        engine.step()
    trained = gathered(engine)
    with torch.no_grad():
        engine(batch, rows, targets)
    evaluated = gathered(engine)
    engine.release_gathered()
    released = gathered(engine)
    return {"forwards": forwards, "after": [persistent, trained, evaluated, released]}


def test_training_gathers_once_a_pass_after_an_evaluation(tmp_path: Path) -> None:
    model = save_causal("llama-uneven", tmp_path / "model")
    whole = sum(p.numel() for p in model.parameters())
    for found in results_of(f"{__name__}:evaluated_first", 2, tmp_path / "model"):
        persistent, trained, evaluated, released = found["after"]
        assert found["forwards"][-2:] == [whole, whole]
        assert evaluated == whole
        assert 0 < persistent < whole
        assert trained == released == persistent


REUSE = (0, 20_000, 60_000, 10**9)


def kept_by_distance(directory: str) -> dict[str, list[int]]:
    """What is whole between forward and backward, once a pass was recorded, for every distance;
    and the parameters' elements.
    """
    batch = pack(ragged(rank()))
    rows, targets = response_rows(batch, [1] * batch.num_sequences)
    model = load_causal_lm(directory)
    found: dict[str, list[int]] = {"kept": [], "sizes": [p.numel() for p in model.parameters()]}
    for distance in REUSE:
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        zero["stage3_max_reuse_distance"] = distance
        engine = TrainEngine(
            load_causal_lm(directory), OptimizerConfig(), 9, {"zero_optimization": zero}
        )
        for _ in range(2):
            logprobs = engine(batch, rows, targets).logprobs
            kept = gathered(engine)
            engine.backward(-logprobs.sum(), 100)
            engine.step()
        found["kept"].append(kept)
        engine.close()
    return found


def test_a_pass_keeps_what_the_plan_says(tmp_path: Path) -> None:
    save_causal("llama-uneven", tmp_path / "model")
    for found in results_of(f"{__name__}:kept_by_distance", 2, tmp_path / "model"):
        whole, largest = sum(found["sizes"]), max(found["sizes"])
        for distance, kept in zip(REUSE, found["kept"], strict=True):
            planned = Zero(stage=3, ranks=2, reuse=distance).gathered(whole, largest)
            assert planned - 2 * largest <= kept <= planned, distance
        assert len(set(found["kept"])) == len(REUSE)
