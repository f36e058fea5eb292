"""Checkpoints of several ranks: one directory, and any number of ranks goes on from it."""

from pathlib import Path

import pytest
import torch

from hybrid_engine.checkpoint import Checkpoints, RunState
from hybrid_engine.distributed.collectives import rank, world_size
from hybrid_engine.rl.ema import EMA
from tests.distributed.ranks import results_of

pytestmark = pytest.mark.multi_process
HERE = "tests.distributed.test_checkpoint_ranks"
STAGES = (0, 1, 2, 3)
ROWS = 12


def new_parts(stage):
    from tests.test_checkpoint import make_engine

    engine = make_engine(stage)
    return engine, EMA(engine.local_parameters(), 0.9)


def train(engine, ema, start: int, steps: int) -> list[float]:
    """Steps on rows that depend on the step alone, whoever has them."""
    norms = []
    for step in range(start, start + steps):
        x = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(step))
        mine = x[rank() :: world_size()]
        for half in mine.split(-(-len(mine) // 2)):
            engine.backward(engine(half).square().sum(), ROWS)
        norms.append(engine.step())
        ema.update(engine.local_parameters())
    return norms


def everything(engine, ema) -> list[float]:
    """Weights and averages, flattened, on rank 0."""
    found = list(engine.gathered_state_dict().values())
    with engine.parameters_replaced(ema.averages):
        found += [t.clone() for t in engine.gathered_state_dict().values()]
    return torch.cat([t.flatten() for t in found]).tolist() if found else []


def save_and_go_on(directory):
    """How this rank goes on from its checkpoints, uninterrupted and resumed."""
    return [go_on(directory), resume(directory)]


def go_on(directory):
    found = {}
    for stage in STAGES:
        engine, ema = new_parts(stage)
        norms = train(engine, ema, 0, 3)
        torch.manual_seed(100 + rank())
        checkpoints = Checkpoints(Path(directory, f"zero-{stage}"))
        state = RunState("sft", 3)
        checkpoints.save(3, state, {"policy": engine}, engine.parts(ema.averages))
        draw = torch.rand(1).item()
        norms += train(engine, ema, 3, 3)
        found[str(stage)] = [norms[3:], everything(engine, ema), draw]
    return found


def resume(directory):
    found = {}
    for stage in STAGES:
        engine, ema = new_parts(stage)
        torch.manual_seed(5)
        checkpoints = Checkpoints(Path(directory, f"zero-{stage}"))
        path = checkpoints.latest()
        assert path is not None
        state = checkpoints.restore(path, {"policy": engine}, engine.parts(ema.averages))
        assert (state.iteration, state.ranks, engine.steps) == (3, 2, 3)
        draw = torch.rand(1).item()
        norms = train(engine, ema, 3, 3)
        found[str(stage)] = [norms, everything(engine, ema), draw]
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of two ranks in each ZeRO stage, and how the ranks went on from them."""
    directory = tmp_path_factory.mktemp("two-ranks")
    return directory, results_of(f"{HERE}:save_and_go_on", 2, directory)


def test_as_many_ranks_continue_bit_for_bit(saved):
    for uninterrupted, resumed in saved[1]:
        assert resumed == uninterrupted


def check(found, expected):
    for stage in map(str, STAGES):
        norms, weights, _ = expected[0][stage]
        assert found[0][stage][0] == pytest.approx(norms, rel=1e-5)
        assert found[0][stage][1] == pytest.approx(weights, rel=1e-5, abs=1e-6)
        draws = [by_rank[stage][2] for by_rank in found]
        known = [by_rank[stage][2] for by_rank in expected][: len(found)]
        assert draws[: len(known)] == known
        assert len(set(draws)) == len(found)  # new ranks have random numbers of their own


def test_one_rank_continues(saved):
    directory, expected = saved
    check([resume(directory)], [uninterrupted for uninterrupted, _ in expected])


@pytest.mark.slow
def test_four_ranks_continue(saved):
    directory, expected = saved
    found = results_of(f"{HERE}:resume", 4, directory)
    check(found, [uninterrupted for uninterrupted, _ in expected])


def test_no_value_is_written_twice(saved):
    """Together the ranks write weights, two moments, averages and step counts, once."""
    from tests.test_checkpoint import make_engine

    directory, _ = saved
    trained = sum(p.numel() for p in make_engine(0).module.parameters() if p.requires_grad)
    for stage in STAGES:
        files = list((directory / f"zero-{stage}/step-000003").rglob("part-*.safetensors"))
        assert len(files) == 4
        values = sum(f.stat().st_size - 8 - header_length(f) for f in files)
        steps = 2 * 3 * 4  # of three parameters, twice where both ranks have some of one
        assert 16 * trained <= values <= 16 * trained + steps


def header_length(file: Path) -> int:
    return int.from_bytes(file.read_bytes()[:8], "little")
