"""Declared bytes that are exact: parameters, optimizer state, sharing, the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybrid_engine.config import GenerationConfig, OptimizerConfig
from hybrid_engine.engine import SamplingParams, gather_plan
from hybrid_engine.engine.train_engine import TrainEngine
from hybrid_engine.models import (
    LoRAConfig,
    ScalarModel,
    load_causal_lm,
    load_scalar_model,
    share_frozen_trunk,
)
from hybrid_engine.plan import generation
from hybrid_engine.plan.generation import (
    RolloutShape,
    gather_holdings,
    part_sizes,
    rollout_holdings,
)
from hybrid_engine.plan.models import model_size, own_bytes, shared_blocks
from hybrid_engine.plan.training import Zero
from tests.engine.rollouts import run
from tests.tiny import make_tiny_model


@pytest.fixture(scope="module", params=["llama", "gpt2", "opt"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), request.param)


def bytes_of(tensors: list[torch.Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, LoRAConfig(r=4)], ids=["all", "lora"])
def test_parameters_and_moments(directory: Path, dtype: str, lora: LoRAConfig | None) -> None:
    model = load_causal_lm(directory, dtype, lora)
    size = model_size(model.spec, dtype, "it", lora=lora)
    assert size.nbytes == bytes_of(list(model.parameters()))
    if dtype == "bfloat16":
        return
    engine = TrainEngine(model, OptimizerConfig(), 1, {})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    engine.optimizer.step()
    states = engine.optimizer.state.values()
    moments = [state[kind] for state in states for kind in ("exp_avg", "exp_avg_sq")]
    assert bytes_of(moments) == 8 * size.trained


def test_what_models_share(directory: Path) -> None:
    policy = load_causal_lm(directory, trainable_layers=1)
    reference = load_causal_lm(directory).requires_grad_(False)
    critic = load_scalar_model(directory, trainable_layers=1)
    spec, path = policy.spec, str(directory)
    sizes = [
        model_size(spec, "float32", path, trainable_layers=1),
        model_size(spec, "float32", path, frozen=True),
        model_size(spec, "float32", path, scalar=True, trainable_layers=1),
    ]
    assert shared_blocks(sizes) == share_frozen_trunk([policy, reference, critic]) == 1
    together = [p for m in (policy, reference, critic) for p in m.parameters()]
    assert sum(own_bytes(sizes, sharing=True)) == bytes_of(together)
    assert isinstance(critic, ScalarModel)


@pytest.mark.parametrize("kv_blocks", [0, 7])
def test_cache_and_scratch_of_a_rollout(directory: Path, kv_blocks: int) -> None:
    """The program's own declaration, made without it, against what a rollout reports."""
    model = load_causal_lm(directory)
    spec = model.spec
    block = spec.num_layers * 2 * spec.kv_size * 64 * 4
    shape = RolloutShape(prompts=3, prompt_tokens=70, samples=2, new_tokens=80)
    config = GenerationConfig(max_batch=4, kv_bytes=kv_blocks * block)
    params = SamplingParams(n=2, max_new_tokens=80)
    prompts = [[i + 1] * 70 for i in range(3)]
    counters = run(model, prompts, params, max_batch=4, kv_bytes=config.kv_bytes).counters
    cache, scratch = rollout_holdings(
        model_size(spec, "float32", "it"), shape, config, "generate.rollout"
    )
    assert cache.bytes_at("generate.rollout") == counters["arena_blocks"] * counters["block_bytes"]
    assert 0 < scratch.bytes_at("generate.rollout") <= counters["scratch_bytes"]


@pytest.mark.parametrize("lora", [None, LoRAConfig(r=3)], ids=["all", "lora"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_what_is_gathered(directory: Path, ranks: int, lora: LoRAConfig | None) -> None:
    """Parts are as large as the engine finds them in a model that is cut into shards."""
    model = load_causal_lm(directory, lora=lora)
    for p in model.parameters():  # as DeepSpeed leaves them
        p.ds_numel, p.ds_shape = p.numel(), p.shape
        p.ds_tensor = torch.empty(-(-p.numel() // ranks))
    size = model_size(model.spec, "float32", "it", lora=lora)
    assert part_sizes(size, ranks) == gather_plan.part_sizes(model, ranks)


@pytest.mark.parametrize("lora", [None, LoRAConfig(r=3)], ids=["all", "lora"])
def test_one_copy_for_a_host_lies_where_gradients_do(
    directory: Path, lora: LoRAConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_causal_lm(directory, lora=lora)
    size = model_size(model.spec, "float32", "it", lora=lora)
    zero, moment = Zero(stage=3, ranks=2), "generate.rollout"

    def held(nodes: list[int], one_host: bool = True) -> list[int]:
        monkeypatch.setattr(generation, "system_nodes", lambda: nodes)
        found = gather_holdings(size, zero, GenerationConfig(), one_host, moment)
        return [holding.bytes_at(moment) for holding in found]

    shard = sum(part_sizes(size, 2).shards)
    weights, staging = held([0])
    assert staging == 0
    assert abs(weights - (shard - 2 * size.trained)) <= 4 * len(size.parameters)
    assert (weights == 0) == (lora is None)
    for elsewhere in (held([0, 1]), held([0], one_host=False)):
        assert elsewhere[0] == sum(part_sizes(size, 2).kept)
        assert elsewhere[1] > 0
