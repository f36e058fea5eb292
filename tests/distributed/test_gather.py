"""Gather-for-generation: several ranks generate what one does, in every ZeRO stage."""

from __future__ import annotations

import dataclasses
import math
import mmap
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from hybrid_engine.config import OptimizerConfig
from hybrid_engine.distributed.collectives import rank, world_size
from hybrid_engine.engine import HybridEngine, SamplingParams, TrainEngine, gather
from hybrid_engine.engine.gather_plan import part_sizes
from hybrid_engine.engine.gather_policy import GatherPolicy, Group
from hybrid_engine.engine.slices import Slices
from hybrid_engine.engine.staging import shards_group
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
    pinned: int | None = None  # layers that stay; None: all
    sockets: bool = False  # as between hosts
    far: bool = False  # each rank's memory at a processor of its own

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
STREAMED = {
    "llama streamed": Case("llama-uneven", pinned=0),
    "llama-lora streamed": Case("llama-uneven", LORA, pinned=0),
    "opt streamed": Case("opt-uneven", pinned=0),
    "opt-lora streamed": Case("opt-uneven", LORA, pinned=0),
    "gpt2 streamed": Case("gpt2-uneven", pinned=0),
    "gpt2-lora streamed": Case("gpt2-uneven", LORA, pinned=0),
    "deep streamed": Case("llama-deep", pinned=4),
    "projected streamed": Case("opt-350m", pinned=0),
    "bfloat16 streamed": Case("llama-uneven", LORA, torch.bfloat16, pinned=0),
}
SOCKETS = {
    "sockets": Case("llama-uneven", LORA, sockets=True),
    "sockets streamed": Case("gpt2-uneven", pinned=0, sockets=True),
}
FAR = {"far": Case("llama-uneven", LORA, far=True)}
EVERY_CASE = {**CASES, **STREAMED, **SOCKETS, **FAR}
FEW_STREAMED = ("llama-lora streamed", "opt streamed", "gpt2 streamed", "bfloat16 streamed")
FAMILIES = tuple(CASES)[:6]
STAGES = (0, 1, 2, 3)


def make_engine(directory: str, case: Case, stage: int) -> HybridEngine:
    model = case.model(Path(directory))
    config = OptimizerConfig(learning_rate=0.01, schedule="constant", warmup_ratio=0.0)
    trained = TrainEngine(model, config, 9, {"zero_optimization": {"stage": stage}})
    limit = limit_of(case, model) if stage == 3 and world_size() > 1 else 0
    engine = HybridEngine(model, None, trained, merge_adapters=case.merge, weight_bytes=limit)
    return where(case, engine)


def where(case: Case, engine: HybridEngine) -> HybridEngine:
    """With its ranks where the case has them. What is streamed is so where no copy is shared."""
    weights_source = engine._weights_source

    def placed() -> Any:
        if shares_copy(case) or engine._weights is not None:
            return weights_source()
        with mock.patch.object(gather, "shards_group", return_value=group_of(case)):
            return weights_source()

    mock.patch.object(engine, "_weights_source", placed).start()
    return engine


def shares_copy(case: Case) -> bool:
    return case.pinned is None and not case.sockets and not case.far


def limit_of(case: Case, model: CausalLM, slices: Slices | None = None) -> int:
    """What so many pinned layers take, and no byte more; the model is in shards."""
    if case.pinned is None:
        return 0
    policy = GatherPolicy(model.spec.num_layers, case.pinned)
    return policy.held_bytes(part_sizes(model, world_size(), slices), group_of(case))


def group_of(case: Case) -> Group:
    if case.sockets:
        return Group(world_size())
    return dataclasses.replace(shards_group(), one_copy=shares_copy(case))


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
    rollout_of(engine, [])
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
    in_shards = (*CASES, *FEW_STREAMED, *SOCKETS, *FAR)
    return run_cases(
        directory, [(name, 3) for name in in_shards] + [("opt-lora", n) for n in (0, 1, 2)]
    )


def many(directory: str) -> dict[str, Any]:
    wanted = [(name, stage) for name in FAMILIES for stage in STAGES]
    return run_cases(directory, wanted + [(name, 3) for name in (*STREAMED, *SOCKETS, *FAR)])


def run_cases(directory: str, wanted: list[tuple[str, int]]) -> dict[str, Any]:
    return {f"{name}/{stage}": one_case(directory, case_of(name), stage) for name, stage in wanted}


def case_of(name: str) -> Case:
    """With or without a stage behind it."""
    return EVERY_CASE[name.split("/")[0]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for layout in {case.layout for case in EVERY_CASE.values()}:
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
        case = case_of(name)
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
            if not case_of(name).merge:  # W + s B A rounds otherwise than W x + s B (A x)
                assert result["captured"] == result["scored"], name
            assert result["captured"] != result["logprobs"] or not result["tokens"], name
            assert result["repeats"], name


def in_shards(name: str) -> bool:
    """Whether the product's own gather serves this case, and not DeepSpeed's."""
    return name.endswith("/3") and not case_of(name).merge


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


def shard_bytes(parameters: list[torch.nn.Parameter], world: int) -> int:
    return sum(math.ceil(p.numel() / world) * p.element_size() for p in parameters)


def test_counters_follow_the_formula(found, directory) -> None:
    """What stays comes once, what is streamed once a round, with 8 bytes in each message."""
    world, ranks = found
    for name in ranks[0]:
        if not in_shards(name):
            assert all(results[name]["gathered"] is None for results in ranks), name
            continue
        case = case_of(name)
        parts = parts_of(case.model(directory))
        layers = len(parts) - 2
        policy = GatherPolicy(layers, layers if case.pinned is None else case.pinned)
        streamed = [parts[block + 1] for block in policy.streamed]
        flag = 8 if streamed else 0
        once = [shard_bytes(part, world) + flag for part in parts if part]
        each_round = [shard_bytes(part, world) + flag for part in streamed]
        for results in ranks:
            counters = results[name]["gathered"]
            assert (counters["rounds"] > 2) == bool(streamed)
            again = counters["rounds"] - 1 if streamed else 0
            assert counters["received_bytes"] == (world - 1) * (
                sum(once) + again * sum(each_round)
            ), name
            assert counters["collectives"] == len(once) + again * len(each_round)
            assert counters["seconds"] > 0
            assert counters["waited_seconds"] >= 0


def test_the_arena_holds_what_stays_and_a_ring(found, directory) -> None:
    world, ranks = found
    for name in filter(in_shards, ranks[0]):
        case = case_of(name)
        parts = parts_of(case.model(directory))
        sizes = [sum(p.nbytes for p in part) for part in parts]
        streamed = len(parts) - 2 - case.pinned if case.pinned is not None else 0
        held = sum(sizes) - streamed * sizes[1] + 2 * sizes[1] * bool(streamed)
        slack = 64 * sum(map(len, parts))
        for results in ranks:
            arena = results[name]["gathered"]["arena_bytes"]
            if not shares_copy(case):
                assert held <= arena < held + slack, name
                continue
            # This rank's part of one copy, beside what lies where gradients do, in whole pages.
            trained = [p for part in parts for p in part if p.requires_grad]
            lent = world * shard_bytes(trained, world)
            least, most = held - lent - world * mmap.PAGESIZE, held + slack - lent
            assert max(0, least) < world * (arena + 1), name
            assert world * arena <= max(0, most), name


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
