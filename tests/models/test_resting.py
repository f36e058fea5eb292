"""Frozen models that wait in the host's memory. The device is the host here, so a weight that has
come to it is told by its address.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hybrid_engine.models import (
    CausalLM,
    Resting,
    load_causal_lm,
    load_scalar_model,
    pack,
    share_frozen_trunk,
)
from tests.tiny import make_tiny_model

BATCH = pack([[1, 2, 3], [4]])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def frozen(directory: Path) -> CausalLM:
    return load_causal_lm(directory).requires_grad_(False).eval()


def addresses(model: nn.Module) -> dict[str, int]:
    return {name: weight.data_ptr() for name, weight in model.named_parameters()}


def test_weights_come_and_go_and_keep_their_bits(directory: Path) -> None:
    model = frozen(directory)
    before, loaded = model.logits(BATCH), addresses(model)
    rest = Resting([model], [])
    assert rest.nbytes == sum(weight.nbytes for weight in model.parameters())
    asleep = addresses(model)
    assert not set(asleep.values()) & set(loaded.values())
    for _ in range(2):
        with rest.awake(model):
            assert not set(addresses(model).values()) & set(asleep.values())
            assert model.head.weight is model.decoder.embed_tokens.weight
            assert torch.equal(model.logits(BATCH), before)
        assert addresses(model) == asleep


def test_an_error_inside_sends_them_back(directory: Path) -> None:
    model = frozen(directory)
    rest = Resting([model], [])
    asleep = addresses(model)
    with pytest.raises(RuntimeError, match="inside"), rest.awake(model):
        raise RuntimeError("inside")
    assert addresses(model) == asleep


def test_blocks_shared_with_a_trained_model_stay(directory: Path) -> None:
    policy = load_causal_lm(directory, trainable_layers=1)
    reference, critic = frozen(directory), load_scalar_model(directory).requires_grad_(False)
    assert share_frozen_trunk([policy, reference, critic]) == 1
    loaded = addresses(policy)
    rest = Resting([reference, critic], [policy])
    with rest.awake(reference, critic):
        for model in (reference, critic):
            found = addresses(model)
            assert found["decoder.blocks.0.qkv.weight"] == loaded["decoder.blocks.0.qkv.weight"]
            assert found["decoder.blocks.1.qkv.weight"] not in loaded.values()
        assert addresses(policy) == loaded


def test_what_frozen_models_share_is_moved_once(directory: Path) -> None:
    models = [frozen(directory), frozen(directory)]
    assert share_frozen_trunk(models) > 0
    rest = Resting(models, [])
    assert rest.nbytes < 2 * Resting([frozen(directory)], []).nbytes
    name = "decoder.blocks.0.qkv.weight"
    assert addresses(models[0])[name] == addresses(models[1])[name]
    with rest.awake(*models):
        assert addresses(models[0])[name] == addresses(models[1])[name]
    asleep = addresses(models[1])
    with rest.awake(models[0]):
        assert addresses(models[1]) == asleep
