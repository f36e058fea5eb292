"""The program for GPUs on weights that ZeRO-3 has in shards: recorded steps read the arena."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hybrid_engine.engine.device import DeviceGenerator
from tests.distributed.ranks import results_of
from tests.distributed.test_gather import CASES, make_engine, rollout_of, share, train_step
from tests.engine.tape import TapeRecorder
from tests.models.peers import save_causal

pytestmark = pytest.mark.multi_process
NAMES = ("llama-lora", "opt")


def both(directory: str) -> dict[str, Any]:
    return {name: compared(directory, name) for name in NAMES}


def compared(directory: str, name: str) -> dict[str, Any]:
    """Two rollouts of either program, before and after a step."""
    engine, mine = make_engine(directory, CASES[name], 3), share()
    native = phase(engine, mine)
    recorder = TapeRecorder()
    engine._native = DeviceGenerator(
        engine.model, engine._weights_source(), recorder=recorder, lag=2
    )
    ours = phase(engine, mine)
    recorded = recorder.recorded
    train_step(engine)
    moved = phase(engine, mine)
    engine._native = None
    return {
        "equal": ours == native and moved == phase(engine, mine),
        "trained": moved[0][0] != ours[0][0] or moved[0][1] != ours[0][1],
        "recorded": [recorded, recorder.recorded],
        "buckets": len({min(1 << i, 2 * len(mine)) for i in range(5)}),
        "gathered": engine.gathered is not None and engine.gathered.collectives > 0,
    }


def phase(engine: Any, mine: list[int]) -> list[tuple[Any, Any]]:
    with engine.generation():
        rollouts = [rollout_of(engine, mine) for _ in range(2)]
    return [(rollout.tokens, rollout.logprobs) for rollout in rollouts]


def test_two_ranks_generate_what_the_cpp_program_does(tmp_path: Path) -> None:
    for layout in {CASES[name].layout for name in NAMES}:
        save_causal(layout, tmp_path / layout)
    for rank in results_of(f"{__name__}:both", 2, tmp_path):
        for name in NAMES:
            found = rank[name]
            assert found["equal"], name
            assert found["trained"], name
            assert found["gathered"], name
            once, twice = found["recorded"]
            # The second rollout of a phase records nothing anew: the weights have not moved.
            assert 0 < once <= found["buckets"]
            assert twice <= 2 * found["buckets"]
