"""Ranks that generate together with unequal work, and what ends a rollout that they share."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_engine.distributed.collectives import rank
from hybrid_engine.engine import HybridEngine, SamplingParams, partial_rollout
from hybrid_engine.engine.program import ProgramBuilder
from hybrid_engine.engine.slices import slice_decoder
from hybrid_engine.errors import UserError
from hybrid_kernels import native_module
from tests.distributed.ranks import results_of
from tests.distributed.test_gather import Case, train_step
from tests.distributed.test_gather_ragged import ALL_TOKENS, with_timeout
from tests.distributed.test_tensor_parallel import make_engine
from tests.models.peers import VOCAB, save_causal

MODEL = Case("llama-uneven")
ROUNDS, FEW_ROUNDS, SCORED_EVERY = 200, 20, 10
PROMPTS = [[5, 6, 7], [8] * 20, [9]]
PARAMS = SamplingParams(max_new_tokens=12, seed=3, ignore_eos=True)


def few_rounds(directory: str) -> int:
    return fuzz(directory, FEW_ROUNDS, together=2)


def all_rounds(directory: str) -> int:
    return fuzz(directory, ROUNDS, together=3)


def one_round(engine: HybridEngine, own: random.Random, common: random.Random) -> Any:
    """Any number of rollouts; what each rank asks for is its own affair, how often is not."""
    rollout = None
    with engine.generation():
        for _ in range(common.choice((0, 1, 1, 2))):
            stops = common.choice(((), (5, 6), ALL_TOKENS))
            params = SamplingParams(max_new_tokens=common.randrange(1, 20), stop_token_ids=stops)
            prompts = [
                [own.randrange(VOCAB)] * own.randrange(1, 40) for _ in range(own.randrange(4))
            ]
            limits = [own.randrange(1, 20) for _ in prompts] if own.random() < 0.5 else None
            rollout = engine.generate(prompts, params, max_new_tokens=limits)
            if stops == ALL_TOKENS:
                assert all(len(tokens) == 1 for tokens in rollout.tokens)
    return rollout


def fuzz(directory: str, rounds: int, together: int) -> int:
    """Weights change between the rounds. Returns how many samples were compared."""
    engine = make_engine(directory, MODEL, 3, together)
    own, common = random.Random(rank()), random.Random(99)
    compared, rollout = 0, None
    for number in range(1, rounds + 1):
        rollout = one_round(engine, own, common) or rollout
        if number % SCORED_EVERY:
            continue
        sequences = rollout.sequences if rollout else []
        lengths = [len(prompt) for prompt in rollout.prompts] if rollout else []
        scored = engine.token_logprobs(sequences, lengths)
        captured = rollout.logprobs if rollout else []
        assert [row.tolist() for row in scored] == captured
        compared, rollout = compared + len(captured), None
        train_step(engine)
    return compared


@pytest.mark.multi_process
@pytest.mark.slow
def test_random_ragged_rounds(tmp_path: Path) -> None:
    save_causal("llama-uneven", tmp_path / "llama-uneven")
    assert min(results_of(f"{__name__}:all_rounds", 3, tmp_path)) > 10


@pytest.mark.multi_process
def test_a_few_ragged_rounds(tmp_path: Path) -> None:
    save_causal("llama-uneven", tmp_path / "llama-uneven")
    assert sum(results_of(f"{__name__}:few_rounds", 2, tmp_path)) > 0


class EnoughError(Exception):
    """What a callback raises."""


def endings(directory: str) -> dict[str, Any]:
    """Everything that ends a shared rollout, each followed by one that must be none the worse."""
    with_timeout(5)
    engine = make_engine(directory, MODEL, 0, 2)
    mine = PROMPTS[rank() :: 2]
    seen: list[tuple[int, int]] = []
    rollout = engine.generate(mine, PARAMS, on_token=lambda *drawn: seen.append(drawn))
    streams = [[token for at, token in seen if at == i] for i in range(len(mine))]
    found: dict[str, Any] = {"streamed": streams == rollout.tokens, "tokens": rollout.tokens}

    def stop_on_rank_1(done: int, total: int, tokens: int) -> None:
        if rank() == 1 and done:
            raise EnoughError("enough")

    limits = [1 if prompt == PROMPTS[0] else 12 for prompt in mine]
    with pytest.raises((EnoughError, RuntimeError)) as caught:
        engine.generate(mine, PARAMS, on_progress=stop_on_rank_1, max_new_tokens=limits)
    partial = partial_rollout(caught.value)
    found["callback"] = [type(caught.value).__name__, str(caught.value), partial.samples]

    with pytest.raises(UserError) as refused:
        engine.generate(mine, SamplingParams(max_new_tokens=3 + rank()))
    found["unequal"] = str(refused.value)

    found["again"] = engine.generate(mine, PARAMS).tokens == rollout.tokens
    if rank() == 1:
        engine._native._native.builder.bind = broken
    with pytest.raises(RuntimeError) as lost:
        engine.generate(mine, PARAMS)
    found["broken"] = str(lost.value)

    if rank() == 1:
        time.sleep(7)  # longer than rank 0 waits
    else:
        with pytest.raises(RuntimeError) as missed:
            engine.generate(mine, PARAMS)
        found["missing"] = str(missed.value)
    return found


def broken(*arguments: Any) -> None:
    raise RuntimeError("out of luck")


@pytest.mark.multi_process
def test_a_shared_rollout_ends_for_all(tmp_path: Path) -> None:
    save_causal("llama-uneven", tmp_path / "llama-uneven")
    first, second = results_of(f"{__name__}:endings", 2, tmp_path)
    alone = HybridEngine(MODEL.model(tmp_path), None)
    for who, found in enumerate((first, second)):
        ids = [(who << 40) + i for i in range(len(PROMPTS[who::2]))]
        assert found["tokens"] == alone.generate(PROMPTS[who::2], PARAMS, sample_ids=ids).tokens
        assert found["streamed"]
        assert found["again"]
        assert found["unequal"].startswith("ranks that generate together (inference_tp) must give")
        assert "equal params, but rank 1 has" in found["unequal"]
    assert second["callback"] == ["EnoughError", "enough", []]
    kind, said, finished = first["callback"]
    assert kind == "RuntimeError"
    assert said.startswith("another rank ended the rollout")
    assert finished == [0]
    assert second["broken"] == "out of luck"
    assert first["broken"].startswith("rank 1 left the rollout that this rank shares with it")
    assert "waited 5 s at 'tensor-parallel generation' for rank 1" in first["missing"]


def test_a_rank_that_never_answers_is_named(tmp_path: Path) -> None:
    save_causal("llama-uneven", tmp_path / "llama-uneven")
    model = MODEL.model(tmp_path)
    native = native_module()
    memory = torch.zeros(native.Peers.bytes_for(2), dtype=torch.uint8)
    peers = native.Peers(memory, 1, 2, 6, 0.2)
    slices = slice_decoder(model.spec, 1, 2)
    weights = {name: slices.cut(name, p.detach()) for name, p in model.named_parameters()}
    tables = {n: t for n, t in ProgramBuilder(model).tensors(64).items() if n.startswith("rope")}
    program = native.DecodeProgram(model.spec.as_dict(), slices.as_dict(), peers)
    program.bind({**weights, **tables})
    peers.begin(1)
    with pytest.raises(
        RuntimeError, match=r"^rank 7 waited 0 s at 'tensor-par.*' for rank 6; look"
    ):
        program.generate(
            [[5, 6]],
            samples_per_prompt=1,
            max_new_tokens=2,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            seed=0,
            sample_ids=[0],
            stop_tokens=[],
        )


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    save_causal("llama-uneven", tmp_path / "llama-uneven")
    model = MODEL.model(tmp_path)
    with pytest.raises(UserError, match="does not divide the 1 rank"):
        HybridEngine(model, None, inference_tp=2)
    with pytest.raises(UserError, match="inference_tp is 10, but the model has 9 attention heads"):
        slice_decoder(model.spec, 0, 10)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 9])
def test_slices_cover_every_row(ranks: int, tmp_path: Path) -> None:
    """Each output row is computed by one rank; key-value rows by all whose queries look at them."""
    save_causal("llama-uneven", tmp_path / "llama-uneven")
    model = MODEL.model(tmp_path)
    spec = model.spec
    everyone = [slice_decoder(spec, rank, ranks) for rank in range(ranks)]
    for name, parameter in model.named_parameters():
        if everyone[0].rows(name) is None:
            continue
        counts = torch.zeros(len(parameter), dtype=torch.int64)
        for slices in everyone:
            for begin, end in slices.rows(name):
                counts[begin:end] += 1
        once = spec.q_size if "qkv" in name else len(parameter)
        assert (counts[:once] == 1).all(), name
        assert (counts[once:] >= 1).all(), name
    group = spec.heads // spec.kv_heads
    for slices in everyone:
        first, end = slices.heads[slices.rank], slices.heads[slices.rank + 1]
        (_, _), (keys, keys_end), _ = slices.rows("decoder.blocks.0.qkv.weight")
        wanted = {spec.q_size // spec.head_dim + head // group for head in range(first, end)}
        assert {row // spec.head_dim for row in range(keys, keys_end)} == wanted
