"""A collective of DeepSpeed's that a rank does not come to."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hybrid_engine.config import OptimizerConfig
from hybrid_engine.distributed import process_group
from hybrid_engine.distributed.collectives import (
    RankTimeout,
    all_gather_json,
    enter_phase,
    rank,
)
from tests.distributed.ranks import results_of

pytestmark = pytest.mark.multi_process


def late(directory):
    """Rank 1 scores for ever while rank 0 trains; ZeRO-2 reduces gradients in its backward."""
    from hybrid_engine.engine.train_engine import TrainEngine

    world = process_group.initialise()
    zero = {"zero_optimization": {"stage": 2}}
    engine = TrainEngine(nn.Linear(3, 1), OptimizerConfig(), 1, zero, "actor")
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)
    from deepspeed.utils import groups

    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), groups._clone_world_group())
    if rank() == 1:
        enter_phase("score")
        world.store.wait(["told"], timedelta(seconds=60))
        return None
    found = []
    for what in (lambda: train(engine), lambda: all_gather_json(1)):
        with pytest.raises(RankTimeout) as caught:
            what()
        found.append(str(caught.value))
    world.store.set("told", "")
    return found


def train(engine):
    engine.backward(engine(torch.ones(2, 3)).sum(), 2)
    engine.step()


def test_who_waits_where_for_whom(tmp_path):
    (training, exchanging), _ = results_of(f"{__name__}:late", 2, tmp_path)
    assert training.startswith("rank 0 waited in vain at 'actor: ")
    assert exchanging.startswith("rank 0 waited in vain at 'an exchange of numbers'")
    for message in (training, exchanging):
        assert "for rank 1 (last seen at 'score')" in message
