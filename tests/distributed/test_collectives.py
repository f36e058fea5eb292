"""Messages between two ranks, and the same calls in a process that is alone."""

import math
from datetime import timedelta

import pytest
import torch

from hybrid_engine.distributed import collectives as c
from hybrid_engine.rl.advantages import whiten
from hybrid_engine.rl.metrics import Averages
from hybrid_engine.rl.moments import moments_of
from tests.distributed.ranks import results_of

pytestmark = pytest.mark.multi_process
SAMPLE = torch.linspace(-3, 5, 37, dtype=torch.float64) ** 3


def exchange(directory):
    """Everything once; each rank's findings go back to the test."""
    rank = c.rank()
    share = SAMPLE[:30] if rank == 0 else SAMPLE[30:]
    averages = Averages()
    averages.add("both", total=float(rank), weight=1)
    if rank == 1:
        averages.add("only one", total=6.0, weight=2)
    found = {
        "sums": c.all_reduce_sums({"a": 1.5, "late": 1.0} if rank else {"a": 0.25}),
        "max": c.all_reduce_max(float(rank)),
        "max with nan": str(c.all_reduce_max(math.nan if rank else 1.0)),
        "gathered": c.all_gather_json({"rank": rank, "text": "é" * (1 + 9 * rank)}),
        "broadcast": c.broadcast_json(["from 0", 1.5] if rank == 0 else None),
        "moments": c.all_reduce_moments(moments_of(share)).tolist(),
        "averages": averages.result(c.all_gather_json),
        "white": whitened_share(share),
    }
    for _ in range(3):
        c.barrier("several in a row")
    found["timeout"] = late_rank(rank)
    return found


def whitened_share(share):
    x = share.float().reshape(1, -1)
    return whiten(x, torch.ones_like(x, dtype=torch.bool), c.all_reduce_moments).flatten().tolist()


def late_rank(rank):
    """Rank 1 does something else; rank 0 must say so."""
    c.enter_phase("generate")
    c.barrier("in step")
    if rank == 1:
        c.enter_phase("a very long download")
        c.broadcast_json(None)
        return None
    c.enter_phase("save")
    with pytest.raises(c.RankTimeout) as caught:
        c.barrier("save checkpoint", timeout=timedelta(seconds=1))
    c.broadcast_json("go on")
    return str(caught.value)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return results_of(
        "tests.distributed.test_collectives:exchange", 2, tmp_path_factory.mktemp("ranks")
    )


def test_values_are_the_same_everywhere(found):
    first, second = found
    for name in ("sums", "max", "gathered", "broadcast", "moments", "averages"):
        assert first[name] == second[name]
    assert first["sums"] == {"a": 1.75, "late": 1.0}
    assert first["max"] == 1.0
    assert first["max with nan"] == "nan"
    assert first["gathered"][1] == {"rank": 1, "text": "é" * 10}
    assert first["broadcast"] == ["from 0", 1.5]
    assert first["averages"] == {"both": 0.5, "only one": 3.0}


def test_moments_are_those_of_the_union(found):
    assert found[0]["moments"] == pytest.approx(moments_of(SAMPLE).tolist(), rel=1e-12)


def test_whitening_is_global(found):
    expected = (SAMPLE - SAMPLE.mean()) / SAMPLE.std()
    together = torch.tensor(found[0]["white"] + found[1]["white"], dtype=torch.float64)
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-6)


def test_a_late_rank_is_named_with_its_phase(found):
    message = found[0]["timeout"]
    assert "rank 0 waited 1 s at 'save checkpoint' for rank 1" in message
    assert "last seen at 'a very long download'" in message


def test_alone_every_call_is_the_identity():
    assert (c.rank(), c.world_size(), c.is_main()) == (0, 1, True)
    assert c.all_reduce_sums({"a": 1.0}) == {"a": 1.0}
    assert c.broadcast_json([1]) == [1]
    assert c.all_gather_json(2) == [2]
    moments = moments_of(SAMPLE)
    torch.testing.assert_close(c.all_reduce_moments(moments), moments)
    c.barrier("nobody to wait for", timeout=timedelta(0))
