"""An engine that is closed leaves nothing behind: the next step of a run needs the room."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from hybrid_engine.config import OptimizerConfig
from hybrid_engine.distributed.collectives import rank
from hybrid_engine.engine import HybridEngine, SamplingParams, TrainEngine
from hybrid_engine.models import load_causal_lm, pack, response_rows
from tests.distributed.ranks import results_of
from tests.models.peers import ragged, save_causal

pytestmark = pytest.mark.multi_process

STAGES = (0, 1, 2, 3)


def live_bytes() -> int:
    gc.collect()
    found = (item for item in gc.get_objects() if isinstance(item, torch.Tensor))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    return sum(storages.values())


def trained_and_closed(directory: str, stage: int) -> int:
    """Generates, makes a step and closes. Returns the bytes that the engine had."""
    model = load_causal_lm(directory)
    engine = TrainEngine(model, OptimizerConfig(), 3, {"zero_optimization": {"stage": stage}})
    HybridEngine(model, None, engine).generate([[1, 2]], SamplingParams(max_new_tokens=2))
    batch = pack(ragged(rank()))
    rows, targets = response_rows(batch, [1] * batch.num_sequences)
    engine.backward(-engine(batch, rows, targets).logprobs.sum(), 100)
    engine.step()
    held = live_bytes()
    engine.close()
    return held


def every_stage(directory: str) -> dict[str, list[int]]:
    found = {}
    for stage in STAGES:
        before = live_bytes()
        held = trained_and_closed(directory, stage)
        found[str(stage)] = [held - before, live_bytes() - before]
    return found


def test_nothing_of_a_closed_engine_is_left(tmp_path: Path) -> None:
    model = save_causal("llama-uneven", tmp_path / "model")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    for found in results_of(f"{__name__}:every_stage", 2, tmp_path / "model"):
        for stage, (held, left) in found.items():
            assert held > weights, stage
            assert left < weights // 20, stage
