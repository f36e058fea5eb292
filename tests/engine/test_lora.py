"""Generating with adapters: in the native program's own path, merged, and switched off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybrid_engine.config import OptimizerConfig
from hybrid_engine.engine import HybridEngine, SamplingParams
from hybrid_engine.errors import UserError
from hybrid_engine.models import (
    LoRAConfig,
    adapted_linears,
    adapters_disabled,
    load_causal_lm,
    save_adapter,
)
from tests.tiny import make_tiny_model

PROMPTS = [list(b"The film"), list(b"was"), list(b"seen by many")]
PARAMS = SamplingParams(n=2, max_new_tokens=12, seed=3, ignore_eos=True)


def fill(model) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, linear in adapted_linears(model):
            linear.lora_b.copy_(torch.randn(linear.lora_b.shape, generator=generator) * 0.5)


@pytest.fixture(params=["llama", "opt", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "base", request.param)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    model = load_causal_lm(base, lora=LoRAConfig(4, 32.0))
    fill(model)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def generate(engine: HybridEngine):
    return engine.generate(PROMPTS, PARAMS, sample_ids=range(6))


def test_an_adapter_directory_generates(base: Path, adapter: Path, tmp_path: Path) -> None:
    engine = HybridEngine.from_pretrained(adapter)
    rollout = generate(engine)
    assert rollout.tokens != generate(HybridEngine.from_pretrained(base)).tokens
    scores = engine.token_logprobs(rollout.sequences, rollout.prompt_lengths)
    for captured, scored in zip(rollout.logprobs, scores, strict=True):
        assert captured == scored.tolist()  # to the bit
    engine.save_adapter(tmp_path / "again")
    again = HybridEngine.from_pretrained(tmp_path / "again", base=base)
    assert generate(again).logprobs == rollout.logprobs


def test_switched_off_the_base_generates(base: Path, adapter: Path) -> None:
    engine = HybridEngine.from_pretrained(adapter)
    with adapters_disabled(engine.model):
        off = generate(engine)
    plain = generate(HybridEngine.from_pretrained(base))
    assert (off.tokens, off.logprobs) == (plain.tokens, plain.logprobs)


def test_merged_generation_gives_the_weights_back(adapter: Path) -> None:
    engine = HybridEngine.from_pretrained(
        adapter,
        deepspeed_config={},
        merge_adapters=True,
        optimizer=OptimizerConfig(schedule="constant", warmup_ratio=0.0, learning_rate=1e-2),
    )
    frozen = {n: p.clone() for n, p in engine.model.named_parameters() if not p.requires_grad}
    for _ in range(3):
        with engine.generation():
            merged = generate(engine)
            inside = dict(engine.model.named_parameters())
            assert any(not torch.equal(inside[n], p) for n, p in frozen.items())
        scores = engine.token_logprobs(merged.sequences, merged.prompt_lengths)
        gaps = [
            (torch.tensor(captured) - scored).abs().max()
            for captured, scored in zip(merged.logprobs, scores, strict=True)
        ]
        assert 0 < max(gaps) < 1e-4
        after = dict(engine.model.named_parameters())
        assert all(torch.equal(after[n], p) for n, p in frozen.items())
        with engine.training():
            train = engine.train_engine
            tokens = sum(merged.lengths)
            batch, rows, targets = packed(merged)
            train.backward(-train(batch, rows, targets).logprobs.sum(), float(tokens))
            assert train.step() > 0


def packed(rollout):
    from hybrid_engine.models import pack, response_rows

    batch = pack(rollout.sequences)
    return batch, *response_rows(batch, rollout.prompt_lengths)


def test_the_base_must_be_there(base: Path, adapter: Path) -> None:
    base.rename(base.with_name("moved"))
    with pytest.raises(UserError, match="base of this adapter cannot be had"):
        HybridEngine.from_pretrained(adapter)
    HybridEngine.from_pretrained(adapter, base=base.with_name("moved"))
