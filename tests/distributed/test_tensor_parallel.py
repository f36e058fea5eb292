"""Ranks that generate together give, bit for bit, what one rank gives: every family and stage."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from hybrid_engine.config import OptimizerConfig
from hybrid_engine.distributed.collectives import rank, world_size
from hybrid_engine.engine import HybridEngine, SamplingParams, TrainEngine
from hybrid_engine.engine.slices import Slices, slice_decoder
from tests.distributed.ranks import results_of
from tests.distributed.test_gather import CASES as GATHER_CASES
from tests.distributed.test_gather import (
    LORA,
    PROMPTS,
    Case,
    limit_of,
    shares_copy,
    train_step,
    where,
)
from tests.models.peers import save_causal
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.multi_process

# `tiny`: five blocks of the vocabulary; its two key-value heads are shared by four ranks.
CASES = {
    **GATHER_CASES,
    "tiny": Case("tiny", LORA),
    "qwen3": Case("qwen3"),
    "streamed": Case("llama-uneven", LORA, pinned=0),
}
FAMILIES = ("llama", "llama-lora", "opt", "opt-lora", "gpt2", "gpt2-lora", "tiny")
EVERY_STAGE = [(name, stage) for name in FAMILIES for stage in (0, 1, 2, 3)]
PARAMS = SamplingParams(n=2, max_new_tokens=10, seed=7, ignore_eos=True)
TRUNCATED = dataclasses.replace(PARAMS, top_k=7, top_p=0.9, temperature=0.7)
GREEDY = dataclasses.replace(PARAMS, n=1, temperature=0.0)
SAMPLING = (PARAMS, TRUNCATED, GREEDY)


def make_engine(directory: str, case: Case, stage: int, together: int) -> HybridEngine:
    model = case.model(Path(directory))
    config = OptimizerConfig(learning_rate=0.01, schedule="constant", warmup_ratio=0.0)
    trained = TrainEngine(model, config, 9, {"zero_optimization": {"stage": stage}})
    limit = 0
    if stage == 3 and world_size() > 1:
        slices = slice_decoder(model.spec, rank() % together, together)
        limit = limit_of(case, model, slices)
    engine = HybridEngine(
        model,
        None,
        trained,
        merge_adapters=case.merge,
        inference_tp=together,
        weight_bytes=limit,
    )
    return where(case, engine)


def share(who: int, world: int) -> list[int]:
    """Prompts of a rank: unequally many, the last of four ranks has none."""
    return [i for i in range(len(PROMPTS)) if i % 3 % world == who]


def rollout_of(engine: HybridEngine, prompts: list[int], params: SamplingParams) -> Any:
    ids = [i * params.n + j for i in prompts for j in range(params.n)]
    return engine.generate([PROMPTS[i] for i in prompts], params, sample_ids=ids)


def columns(rollout: Any) -> dict[str, Any]:
    names = ("tokens", "logprobs", "entropies", "kept_mass", "kept_logprobs", "finish_reasons")
    return {name: getattr(rollout, name) for name in names}


def one_case(directory: str, case: Case, stage: int, together: int) -> dict[str, Any]:
    """Every kind of draw; then train, generate and score with the training forward."""
    engine = make_engine(directory, case, stage, together)
    mine = share(rank(), world_size())
    with engine.generation():
        rollouts = [rollout_of(engine, mine, params) for params in SAMPLING]
        at = engine._native.program.bound_pointers()
    inside = stage == 3 or case.merge or _in_place(engine, at)
    train_step(engine)
    after = rollout_of(engine, mine, PARAMS)
    scored = engine.token_logprobs(
        after.sequences, [len(PROMPTS[i]) for i in mine for _ in range(PARAMS.n)]
    )
    return {
        "rollouts": [columns(rollout) for rollout in rollouts],
        "captured": after.logprobs,
        "scored": [row.tolist() for row in scored],
        "in_place": inside,
        "gathered": engine.gathered and dataclasses.asdict(engine.gathered),
    }


def _in_place(engine: HybridEngine, at: dict[str, int]) -> bool:
    """Whether the program read every parameter, of which it has any row, within its training
    storage."""
    slices = engine._together.slices
    return all(
        parameter.data_ptr() <= at[name] < parameter.data_ptr() + parameter.nbytes
        for name, parameter in engine.model.named_parameters(remove_duplicate=False)
        if kept(slices, name, parameter)
    )


def run_cases(directory: str, wanted: list[tuple[str, int]], together: int) -> dict[str, Any]:
    return {
        f"{name} {stage}": one_case(directory, CASES[name], stage, together)
        for name, stage in wanted
    }


FEW = [("llama-lora", 3), ("streamed", 3), ("opt", 0), ("gpt2-lora", 2), ("tiny", 3)]


def few(directory: str) -> dict[str, Any]:
    return run_cases(directory, FEW, 2)


def pairs(directory: str) -> dict[str, Any]:
    """The other families and formats too."""
    others = [(name, stage) for name in CASES if name not in FAMILIES for stage in (0, 3)]
    return run_cases(directory, EVERY_STAGE + others, 2)


def fours(directory: str) -> dict[str, Any]:
    return run_cases(directory, EVERY_STAGE + [("projected", 3), ("qwen3", 3), ("streamed", 3)], 4)


def two_pairs(directory: str) -> dict[str, Any]:
    return run_cases(directory, [("llama-lora", 3), ("streamed", 3), ("gpt2", 0)], 2)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_tiny_model(root / "tiny", "llama", seed=3)
    for layout in {case.layout for case in CASES.values()} - {"tiny"}:
        save_causal(layout, root / layout)
    return root


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("few", 2), id="2-ranks"),
        pytest.param(("pairs", 2), id="2-ranks-every-stage", marks=pytest.mark.slow),
        pytest.param(("fours", 4), id="4-ranks-every-stage", marks=pytest.mark.slow),
        pytest.param(("two_pairs", 4), id="4-ranks-in-pairs", marks=pytest.mark.slow),
    ],
)
def found(request: pytest.FixtureRequest, directory: Path) -> tuple[str, list[dict]]:
    function, world = request.param
    return function, results_of(f"{__name__}:{function}", world, directory)


def test_ranks_together_generate_what_one_does(found, directory) -> None:
    _, ranks = found
    for name in ranks[0]:
        case = CASES[name.split()[0]]
        engine = HybridEngine(case.model(directory), None, merge_adapters=case.merge)
        for params, *results in zip(SAMPLING, *(r[name]["rollouts"] for r in ranks), strict=True):
            alone = columns(rollout_of(engine, [*range(len(PROMPTS))], params))
            for who, result in enumerate(results):
                mine = share(who, len(ranks))
                samples = [i * params.n + j for i in mine for j in range(params.n)]
                for column, values in result.items():
                    assert values == [alone[column][s] for s in samples], (name, column)


def test_the_first_ratio_is_one(found) -> None:
    """After an optimizer step, what the group captured is what the training forward gives."""
    for results in found[1]:
        for name, result in results.items():
            if not CASES[name.split()[0]].merge:  # W + s B A rounds otherwise than W x + s B (A x)
                assert result["captured"] == result["scored"], name
            assert result["captured"] != result["rollouts"][0]["logprobs"] or not result["captured"]


def test_no_weight_is_copied(found) -> None:
    """Slices are rows of the training storage; under ZeRO-3 the arena has them and no more."""
    for results in found[1]:
        assert all(result["in_place"] for result in results.values())


def kept(slices: Slices, name: str, parameter: Any) -> int:
    """Bytes of a parameter that a rank reads."""
    rows = slices.rows(name)
    if rows is None:
        return parameter.nbytes
    return sum(end - begin for begin, end in rows) * parameter[0].nbytes


def test_counters_follow_the_formula(found, directory) -> None:
    function, ranks = found
    together, world = (4 if function == "fours" else 2), len(ranks)
    for name, first in ranks[0].items():
        case = CASES[name.split()[0]]
        if first["gathered"] is None:
            continue
        model = case.model(directory)
        parameters = dict(model.named_parameters())
        shard = sum(math.ceil(p.numel() / world) * p.element_size() for p in parameters.values())
        for who, results in enumerate(ranks):
            slices = slice_decoder(model.spec, who % together, together)
            weights = sum(kept(slices, at, p) for at, p in parameters.items())
            counters = results[name]["gathered"]
            if case.pinned is not None:
                assert counters["rounds"] > 0
                assert counters["arena_bytes"] < weights
                continue
            assert counters["received_bytes"] == (world - 1) * shard
            slack = 64 * len(parameters)
            if shares_copy(case):  # slices of one copy
                whole = sum(p.nbytes for p in parameters.values())
                assert world * counters["arena_bytes"] < whole + slack
            else:
                assert weights <= counters["arena_bytes"] < weights + slack
