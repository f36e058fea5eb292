"""Gradients of the three steps, on ragged rows: whatever the passes, ranks and ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hybrid_engine.config import OptimizerConfig, PPOConfig, RewardConfig
from hybrid_engine.data import PairExample, SFTExample
from hybrid_engine.distributed.collectives import barrier, is_main, rank, world_size
from hybrid_engine.distributed.parts import Part, PartReader
from hybrid_engine.engine.train_engine import TrainEngine
from hybrid_engine.models import load_causal_lm, load_scalar_model
from hybrid_engine.rl.experience import Experience
from hybrid_engine.stages import reward, sft
from hybrid_engine.stages.update import Updater
from tests.distributed.ranks import results_of
from tests.tiny import make_tiny_model

HERE = "tests.distributed.test_stage_gradients"
LENGTHS = [9, 2, 14, 5, 3, 11, 2]  # responses; seven rows, which neither two nor four divide
PROMPTS = [4, 1, 3, 6, 2, 1, 5]
LONGEST = 20
MICRO_BATCHES = (1, 2, 4)
STAGES = (0, 1, 2, 3)
FIRST_MOMENT = 0.1  # AdamW's average after one step, in units of the gradient: 1 - beta1


def sequences() -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    lengths = [p + n for p, n in zip(PROMPTS, LENGTHS, strict=True)]
    return [torch.randint(250, (n,), generator=draw).tolist() for n in lengths]


def make(load, directory: Path, stage: int) -> TrainEngine:
    config = OptimizerConfig(max_grad_norm=0.0, betas=(1 - FIRST_MOMENT, 0.999))
    return TrainEngine(
        load(directory / "model"), config, 1, {"zero_optimization": {"stage": stage}}
    )


def train_sft(directory: Path, stage: int, max_tokens: int) -> dict[str, TrainEngine]:
    engine = make(load_causal_lm, directory, stage)
    rows = [
        SFTExample(tokens, [(p, len(tokens))])
        for tokens, p in zip(sequences(), PROMPTS, strict=True)
    ]
    sft.train_step(engine, rows[rank() :: world_size()], max_tokens)
    return {"sft": engine}


def train_reward(directory: Path, stage: int, max_tokens: int) -> dict[str, TrainEngine]:
    engine = make(load_scalar_model, directory, stage)
    rows = sequences()
    pairs = [PairExample(a, b, 1, 0.25) for a, b in zip(rows, rows[1:] + rows[:1], strict=True)]
    config = RewardConfig(max_tokens_per_pass=2 * max_tokens, centering=0.01)
    reward.train_step(engine, pairs[rank() :: world_size()], config)
    return {"reward": engine}


def train_ppo(directory: Path, stage: int, max_tokens: int) -> dict[str, TrainEngine]:
    policy, critic = (make(load, directory, stage) for load in (load_causal_lm, load_scalar_model))
    places = list(range(len(LENGTHS)))[rank() :: world_size()]
    config = PPOConfig(
        epochs=1, minibatches=1, max_tokens_per_pass=max_tokens, entropy_coef=0.01, clip_low=0.1
    )
    cast = SimpleNamespace(policy=policy, critic=critic, trunk=lambda batch: None)
    Updater(cast, config)(experience(places), 0, places, len(LENGTHS))  # type: ignore[arg-type]
    return {"policy": policy, "value": critic}


def experience(places: list[int]) -> Experience:
    """Old log-probs about those of the untrained model, whose ratios are clipped here and there."""
    draw = torch.Generator().manual_seed(4)
    old, advantages, values, returns = torch.randn(4, len(LENGTHS), max(LENGTHS), generator=draw)
    old = old * 0.1 - torch.tensor(260.0).log()
    lengths = torch.tensor(LENGTHS)[places]
    width = int(lengths.max()) if places else 0
    rows = [sequences()[i] for i in places]
    inside = torch.arange(width) < lengths[:, None]
    cut = [t[places, :width] * inside for t in (old, advantages, values, returns)]
    return Experience(
        prompts=[row[: PROMPTS[i]] for i, row in zip(places, rows, strict=True)],
        tokens=[row[PROMPTS[i] :] for i, row in zip(places, rows, strict=True)],
        lengths=lengths,
        old_logprobs=cut[0],
        ref_logprobs=cut[0],
        rewards=torch.zeros_like(cut[0]),
        advantages=cut[1],
        values=cut[2],
        returns=cut[3],
    )


KINDS = (train_sft, train_reward, train_ppo)


def gradient(engine: TrainEngine, directory: Path) -> dict[str, torch.Tensor]:
    """Every parameter's, put together from the moments that all ranks write down; on rank 0."""
    engine.save(directory)
    barrier("write gradients")
    found = {}
    if is_main():
        with PartReader(directory, world_size()) as saved:
            for name, parameter in engine.module.named_parameters():
                shape = getattr(parameter, "ds_shape", parameter.shape)
                found[name] = torch.zeros(shape)
                saved.fill(f"exp_avg/{name}", Part(0, found[name].view(-1)))
                found[name] /= FIRST_MOMENT
    barrier("read gradients")
    return found


def collect(directory: str, stages: tuple[int, ...], micro_batches: tuple[int, ...]) -> None:
    """Saves, on rank 0, the gradients of all steps."""
    place = Path(directory)
    for stage in stages:
        for micro in micro_batches:
            for train in KINDS:
                # Rows of more tokens than a pass may have get one of their own.
                for name, engine in train(
                    place, stage, micro * LONGEST if micro > 1 else 1
                ).items():
                    case = f"{name}-{stage}-{micro}"
                    found = gradient(engine, place / f"w{world_size()}-{case}")
                    if is_main():
                        torch.save(found, place / f"w{world_size()}-{case}.pt")


def collect_some(directory: str) -> None:
    collect(directory, (2,), (2,))


def collect_all(directory: str) -> None:
    collect(directory, STAGES, MICRO_BATCHES)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny model, and what one rank finds in stage 0, each row in a pass of its own."""
    directory = tmp_path_factory.mktemp("gradients")
    make_tiny_model(directory / "model")
    collect(str(directory), (0,), (1,))
    return directory


def check(place: Path, world: int, stages: tuple[int, ...], micro_batches: tuple[int, ...]) -> None:
    for name in ("sft", "reward", "policy", "value"):
        expected = torch.load(place / f"w1-{name}-0-1.pt")
        total = torch.cat([g.flatten() for g in expected.values()]).norm()
        assert total > 1e-3
        for stage in stages:
            for micro in micro_batches:
                found = torch.load(place / f"w{world}-{name}-{stage}-{micro}.pt")
                assert found.keys() == expected.keys()
                for key, wanted in expected.items():
                    error = (found[key] - wanted).norm() / wanted.norm()
                    assert error <= 1e-5, f"{name}, {key}: stage {stage}, {micro} a pass"


def test_one_rank_any_passes(place: Path) -> None:
    collect(str(place), (0,), (2, 4))
    check(place, 1, (0,), (2, 4))


@pytest.mark.multi_process
def test_two_ranks(place: Path) -> None:
    results_of(f"{HERE}:collect_some", 2, place)
    check(place, 2, (2,), (2,))


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_ranks_passes_and_zero_stage(place: Path, world: int) -> None:
    results_of(f"{HERE}:collect_all", world, place)
    check(place, world, STAGES, MICRO_BATCHES)
