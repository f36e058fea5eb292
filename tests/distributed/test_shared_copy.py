"""One copy of the gathered weights for all ranks of a host, where their gradients lie."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_engine.distributed.collectives import barrier, rank
from hybrid_engine.engine import HybridEngine, SamplingParams
from hybrid_engine.engine.gather import GatheredWeights
from hybrid_engine.engine.gathered_copy import SharedCopy
from hybrid_engine.models import pack, response_rows
from tests.distributed.ranks import results_of
from tests.distributed.test_gather import LORA, Case, make_engine
from tests.models.peers import ragged, save_causal

pytestmark = [
    pytest.mark.multi_process,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc"),
]

ALL, ADAPTERS = Case("llama-uneven"), Case("llama-uneven", LORA)
PARAMS = SamplingParams(max_new_tokens=5, ignore_eos=True)


def backward(engine: HybridEngine, seed: int) -> None:
    batch = pack(ragged(2 * seed + rank()))
    rows, targets = response_rows(batch, [1] * batch.num_sequences)
    scores = engine.train_engine(batch, rows, targets)
    engine.train_engine.backward(-scores.logprobs.sum(), 100)


def step(engine: HybridEngine, *, interrupted: bool) -> list[Any]:
    """Two passes and a step; in between, a generation phase."""
    with engine.training():
        backward(engine, 0)
    if interrupted:
        engine.generate([[1, 2, 3]], PARAMS)
    with engine.training():
        backward(engine, 1)
        norm = engine.train_engine.step()
    weights = engine.train_engine.local_parameters().values()
    return [norm, [weight.flatten().tolist() for weight in weights]]


def accumulating(directory: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for interrupted in (False, True):
        engine = make_engine(directory, ALL, 3)
        engine.generate([[1, 2, 3]], PARAMS)  # gradients move, and were written over
        found[str(interrupted)] = [step(engine, interrupted=interrupted) for _ in range(2)]
    found["never lent"] = step(make_engine(directory, ALL, 3), interrupted=False)
    return found


def shared_pages() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssShmem:")[1].split()[0]) * 1024


def copy_of(engine: HybridEngine) -> SharedCopy:
    weights = engine._weights
    assert isinstance(weights, GatheredWeights)
    assert isinstance(weights._copy, SharedCopy)
    return weights._copy


def memory(directory: str) -> dict[str, Any]:
    """Bytes of shared pages in and behind a phase, and where gradients are."""
    found = {}
    for name, case in (("all", ALL), ("adapters", ADAPTERS)):
        engine, before = make_engine(directory, case, 3), shared_pages()
        with engine.generation():
            engine.generate([[1, 2, 3]], PARAMS)
            inside = shared_pages() - before
        barrier("all ranks have given their memory back")
        copy = copy_of(engine)
        flat = engine.train_engine._engine.optimizer.grad_partitions_flat_buffer
        found[name] = {
            "inside": inside,
            "behind": shared_pages() - before,
            "copy": copy.storage.nbytes,
            "gradients": flat.nbytes,
            "gradients at": flat.data_ptr() - copy.storage.data_ptr(),
            "gradients are": float(flat.abs().max()),
        }
        engine.generate([[1, 2, 3]], PARAMS)
    return found


def everything(directory: str) -> dict[str, Any]:
    return {"accumulating": accumulating(directory), "memory": memory(directory)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("models")
    save_causal("llama-uneven", root / "llama-uneven")
    return results_of(f"{__name__}:everything", 2, root)


def test_gradients_that_wait_for_their_step_survive_a_generation_phase(ranks) -> None:
    """And padding, which no gradient is ever written to, does not come to hold weights."""
    for found in (results["accumulating"] for results in ranks):
        assert found["True"] == found["False"]
        assert found["False"][0] == found["never lent"]
        assert torch.tensor(found["True"][0][0]).isfinite()


def test_the_copy_lies_where_gradients_do_and_the_rest_goes_back(ranks) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    for who, found in enumerate(results["memory"] for results in ranks):
        for case in found.values():
            assert case["inside"] >= case["copy"]
            lent = -(-case["gradients"] // page) * page
            assert case["gradients at"] == who * lent
            assert case["gradients are"] == 0.0
            assert case["behind"] <= len(ranks) * lent + page
        assert found["adapters"]["copy"] > 4 * found["adapters"]["behind"]
