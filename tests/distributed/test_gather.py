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


@dataclasses.dataclass(frozen=True)
class Case:
    layout: str
    lora: LoRAConfig | None = None
    dtype: torch.dtype = torch.float32
    merge: bool = False

    def model(self, directory: Path) -> CausalLM:
        return load_sharpened(directory / self.layout, self.lora).to(self.dtype)


CASES = {
    "llama": Case("llama-uneven"),
    "llama-lora": Case("llama-uneven", LORA),
    "opt": Case("opt-uneven"),
    "opt-lora": Case("opt-uneven", LORA),
    "gpt2": Case("gpt2-uneven"),
    "gpt2-lora": Case("gpt2-uneven", LORA),
    "untied": Case("llama"),
    "projected": Case("opt-350m"),
    "bfloat16": Case("llama-uneven", LORA, torch.bfloat16),
    "merged": Case("llama-uneven", LORA, merge=True),
}
FAMILIES = tuple(CASES)[:6]
STAGES = (0, 1, 2, 3)


def make_engine(directory: str, case: Case, stage: int) -> HybridEngine:
    model = case.model(Path(directory))
    config = OptimizerConfig(learning_rate=0.01, schedule="constant", warmup_ratio=0.0)
    trained = TrainEngine(model, config, 9, {"zero_optimization": {"stage": stage}})
    return HybridEngine(model, None, trained, merge_adapters=case.merge)


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


def one_case(directory: str, case: Case, stage: int) -> dict[str, Any]:
    """Generate, train, generate again, score with the training forward."""
    engine = make_engine(directory, case, stage)
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


def few(directory: str) -> dict[str, Any]:
    """Every case in shards; every stage for one."""
    return run_cases(
        directory, [(name, 3) for name in CASES] + [("opt-lora", n) for n in (0, 1, 2)]
    )


def many(directory: str) -> dict[str, Any]:
    return run_cases(directory, [(name, stage) for name in FAMILIES for stage in STAGES])


def run_cases(directory: str, wanted: list[tuple[str, int]]) -> dict[str, Any]:
    return {f"{name} {stage}": one_case(directory, CASES[name], stage) for name, stage in wanted}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for layout in {case.layout for case in CASES.values()}:
        save_causal(layout, root / layout)
    return root


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("few", 2), id="2-ranks"),
        pytest.param(("many", 2), id="2-ranks-every-stage", marks=pytest.mark.slow),
        pytest.param(("many", 4), id="4-ranks-every-stage", marks=pytest.mark.slow),
    ],
)
def found(request: pytest.FixtureRequest, directory: Path) -> tuple[int, list[dict]]:
    function, world = request.param
    return world, results_of(f"{__name__}:{function}", world, directory)


def test_ranks_together_generate_what_one_does(found, directory) -> None:
    world, ranks = found
    for name in ranks[0]:
        case = CASES[name.split()[0]]
        engine = HybridEngine(case.model(directory), None, merge_adapters=case.merge)
        alone = rollout_of(engine, [*range(len(PROMPTS))])
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
            if not CASES[name.split()[0]].merge:  # W + s B A rounds otherwise than W x + s B (A x)
                assert result["captured"] == result["scored"], name
            assert result["captured"] != result["logprobs"] or not result["tokens"], name
            assert result["repeats"], name


def in_shards(name: str) -> bool:
    """Whether the product's own gather serves this case, and not DeepSpeed's."""
    case, stage = name.split()
    return stage == "3" and not CASES[case].merge


def test_addresses_stay(found) -> None:
    for results in found[1]:
        for name in filter(in_shards, results):
            assert results[name]["moved"] == [], name


def parts_of(model: CausalLM) -> list[list[torch.nn.Parameter]]:
    """Parameters before, in and behind the blocks; a tied head is before."""
    decoder = model.decoder
    before = [p for module in decoder.embedding_modules() for p in module.parameters()]
    blocks = [list(block.parameters()) for block in decoder.blocks]
    known = {id(p) for p in [*before, *(p for block in blocks for p in block)]}
    return [before, *blocks, [p for p in model.parameters() if id(p) not in known]]


def test_counters_follow_the_formula(found, directory) -> None:
    world, ranks = found
    for name in ranks[0]:
        if not in_shards(name):
            assert all(results[name]["gathered"] is None for results in ranks), name
            continue
        parts = parts_of(CASES[name.split()[0]].model(directory))
        parameters = [p for part in parts for p in part]
        shard = sum(math.ceil(p.numel() / world) * p.element_size() for p in parameters)
        weights = sum(p.nbytes for p in parameters)
        for results in ranks:
            counters = results[name]["gathered"]
            assert counters["received_bytes"] == (world - 1) * shard
            assert counters["collectives"] == sum(1 for part in parts if part)
            assert weights <= counters["arena_bytes"] < weights + 64 * len(parameters)
            assert counters["seconds"] > 0
            assert counters["waited_seconds"] >= 0


def test_one_rank_reads_its_shards_in_place(directory) -> None:
    engine = make_engine(str(directory), CASES["llama-lora"], 3)
    with engine.generation():
        found = rollout_of(engine, [0, 2])
        at = pointers(engine)
    assert engine.gathered is None
    for name, parameter in engine.model.named_parameters():
        assert at[name] == parameter.ds_tensor.data_ptr()
    alone = rollout_of(HybridEngine(CASES["llama-lora"].model(directory), None), [0, 2])
    assert (found.tokens, found.logprobs) == (alone.tokens, alone.logprobs)
    assert torch.equal(*engine.token_logprobs(found.sequences[:1], [9]), _row(found.logprobs[0]))


def _row(values: list[float]) -> torch.Tensor:
    return torch.tensor(values)
