"""Gather-for-generation: several ranks generate what one does, in every ZeRO stage."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_engine.config import OptimizerConfig
from hybrid_engine.distributed.collectives import rank, world_size
from hybrid_engine.engine import HybridEngine, SamplingParams, TrainEngine
from hybrid_engine.models import CausalLM, LoRAConfig, pack, response_rows
from tests.distributed.ranks import results_of
from tests.engine.conftest import load_sharpened
from tests.models.peers import ragged, save_causal

pytestmark = pytest.mark.multi_process

PROMPTS = ragged(1, (9, 1, 30, 2, 17))
PARAMS = SamplingParams(n=2, max_new_tokens=12, seed=7, ignore_eos=True)
LORA = LoRAConfig(r=3, alpha=6.0)
CASES = {
    "llama": ("llama-uneven", None),
    "untied": ("llama", None),
    "llama-lora": ("llama-uneven", LORA),
    "opt": ("opt-uneven", None),
    "projected": ("opt-350m", None),
    "gpt2": ("gpt2-uneven", None),
    "gpt2-lora": ("gpt2-uneven", LORA),
}
STAGES = (0, 1, 2, 3)


def make_engine(
    directory: str, layout: str, stage: int, lora: LoRAConfig | None = None
) -> HybridEngine:
    model = load_sharpened(Path(directory, layout), lora)
    config = OptimizerConfig(learning_rate=0.01, schedule="constant", warmup_ratio=0.0)
    trained = TrainEngine(model, config, 9, {"zero_optimization": {"stage": stage}})
    return HybridEngine(model, None, trained)


def share() -> list[int]:
    """This rank's prompts: unequally many, the last of four ranks has none."""
    return [i for i in range(len(PROMPTS)) if i % 3 % world_size() == rank()]


def rollout_of(engine: HybridEngine, prompts: list[int]) -> Any:
    ids = [i * PARAMS.n + j for i in prompts for j in range(PARAMS.n)]
    return engine.generate([PROMPTS[i] for i in prompts], PARAMS, sample_ids=ids)


def train_step(engine: HybridEngine) -> None:
    """Moves every parameter, by a step that all ranks share."""
    batch = pack(ragged(rank()))
    rows, targets = response_rows(batch, [1] * batch.num_sequences)
    with engine.training():
        scores = engine.train_engine(batch, rows, targets)
        engine.train_engine.backward(-scores.logprobs.sum(), 100)
        engine.train_engine.step()


def pointers(engine: HybridEngine) -> dict[str, int]:
    return engine._native.program.bound_pointers()


def one_case(directory: str, case: str, stage: int) -> dict[str, Any]:
    """Generate, train, generate again, score with the training forward."""
    layout, lora = CASES[case]
    engine = make_engine(directory, layout, stage, lora)
    mine = share()
    with engine.generation():
        before = rollout_of(engine, mine)
        first = pointers(engine)
    train_step(engine)
    with engine.generation():
        after = rollout_of(engine, mine)
        again = rollout_of(engine, mine)
        moved = {name for name, at in pointers(engine).items() if first[name] != at}
    lengths = [len(PROMPTS[i]) for i in mine for _ in range(PARAMS.n)]
    scored = engine.token_logprobs(after.sequences, lengths)
    return {
        "tokens": before.tokens,
        "logprobs": before.logprobs,
        "repeats": after.tokens == again.tokens and after.logprobs == again.logprobs,
        "moved": sorted(moved - {"rope_cos", "rope_sin"}),
        "captured": after.logprobs,
        "scored": [row.tolist() for row in scored],
        "gathered": engine.gathered and dataclasses.asdict(engine.gathered),
    }


def two_ranks(directory: str) -> dict[str, Any]:
    wanted = {(case, 3) for case in CASES} | {("llama", stage) for stage in STAGES}
    return {f"{case} {stage}": one_case(directory, case, stage) for case, stage in sorted(wanted)}


def four_ranks(directory: str) -> dict[str, Any]:
    return {f"{case} 3": one_case(directory, case, 3) for case in ("llama-lora", "opt")}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for layout in {layout for layout, _ in CASES.values()}:
        save_causal(layout, root / layout)
    return root


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, directory: Path) -> tuple[int, list[dict]]:
    function = {2: "two_ranks", 4: "four_ranks"}[request.param]
    return request.param, results_of(f"{__name__}:{function}", request.param, directory)


def test_ranks_together_generate_what_one_does(found, directory) -> None:
    world, ranks = found
    for name in ranks[0]:
        layout, lora = CASES[name.split()[0]]
        alone = rollout_of(
            HybridEngine(load_sharpened(directory / layout, lora), None), [*range(len(PROMPTS))]
        )
        for who, results in enumerate(ranks):
            mine = [i for i in range(len(PROMPTS)) if i % 3 % world == who]
            samples = [i * PARAMS.n + j for i in mine for j in range(PARAMS.n)]
            assert results[name]["tokens"] == [alone.tokens[s] for s in samples], name
            assert results[name]["logprobs"] == [alone.logprobs[s] for s in samples], name


def test_the_first_ratio_is_one(found) -> None:
    """After an optimizer step, what generation captured is what the training forward gives."""
    _, ranks = found
    for results in ranks:
        for name, result in results.items():
            assert result["captured"] == result["scored"], name
            assert result["captured"] != result["logprobs"] or not result["tokens"], name
            assert result["repeats"], name


def test_addresses_stay(found) -> None:
    for results in found[1]:
        for name, result in results.items():
            if name.endswith("3"):
                assert result["moved"] == [], name


def sizes_of_parts(model: CausalLM) -> list[list[int]]:
    """Elements of the parameters before, in and behind the blocks; a tied head is before."""
    decoder = model.decoder
    before = [p for module in decoder.embedding_modules() for p in module.parameters()]
    blocks = [list(block.parameters()) for block in decoder.blocks]
    known = {id(p) for p in [*before, *(p for block in blocks for p in block)]}
    behind = [p for p in model.parameters() if id(p) not in known]
    return [[p.numel() for p in part] for part in (before, *blocks, behind)]


def test_counters_follow_the_formula(found, directory) -> None:
    world, ranks = found
    for name in ranks[0]:
        case, stage = name.split()
        layout, lora = CASES[case]
        parts = sizes_of_parts(load_sharpened(directory / layout, lora))
        shard = sum(math.ceil(size / world) for part in parts for size in part)
        for results in ranks:
            counters = results[name]["gathered"]
            if stage != "3":
                assert counters is None
                continue
            assert counters["received_bytes"] == 4 * (world - 1) * shard
            assert counters["collectives"] == sum(1 for part in parts if part)
            weights = 4 * sum(size for part in parts for size in part)
            assert weights <= counters["arena_bytes"] < weights + 64 * sum(map(len, parts))
            assert counters["seconds"] > 0
            assert counters["waited_seconds"] >= 0


def test_one_rank_reads_its_shards_in_place(directory) -> None:
    engine = make_engine(str(directory), "llama-uneven", 3, LORA)
    with engine.generation():
        found = rollout_of(engine, [0, 2])
        at = pointers(engine)
    assert engine.gathered is None
    for name, parameter in engine.model.named_parameters():
        assert at[name] == parameter.ds_tensor.data_ptr()
    alone = rollout_of(HybridEngine(load_sharpened(directory / "llama-uneven", LORA), None), [0, 2])
    assert (found.tokens, found.logprobs) == (alone.tokens, alone.logprobs)
    assert torch.equal(*engine.token_logprobs(found.sequences[:1], [9]), _row(found.logprobs[0]))


def _row(values: list[float]) -> torch.Tensor:
    return torch.tensor(values)
