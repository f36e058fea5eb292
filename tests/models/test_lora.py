"""Low-rank adapters by themselves: where they go, what trains, and that the base keeps its bits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from hybrid_engine.errors import UserError
from hybrid_engine.models import (
    LoRAConfig,
    adapted_linears,
    adapters_disabled,
    adapters_merged,
    load_causal_lm,
    pack,
    response_rows,
)
from hybrid_engine.models.lora import factors
from hybrid_engine.models.lora_places import adaptable, select, target_modules

from .peers import ragged, save_causal


def loss_of(model) -> torch.Tensor:
    batch = pack(ragged())
    rows, targets = response_rows(batch, [1] * batch.num_sequences)
    return -model(batch, rows, targets).logprobs.mean()


def train(model, steps: int = 1, **options) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **options)
    for _ in range(steps):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8).clone()


def frozen(model) -> dict[str, torch.Tensor]:
    return {n: bytes_of(p) for n, p in model.named_parameters() if not p.requires_grad}


def test_scales() -> None:
    assert LoRAConfig(8, 16.0).scale == 2.0
    assert LoRAConfig(9, 16.0, use_rslora=True).scale == pytest.approx(16 / 3)


@pytest.mark.parametrize("bad", [{"r": 0}, {"dropout": 1.0}, {"target_modules": ()}])
def test_settings_that_make_no_adapter(bad: dict) -> None:
    with pytest.raises(UserError, match="give"):
        LoRAConfig(**bad)


def test_targets_are_names_of_transformers(tmp_path: Path) -> None:
    save_causal("llama", tmp_path / "llama")
    save_causal("gpt2", tmp_path / "gpt2")
    llama, gpt2 = (adaptable(load_causal_lm(tmp_path / n).spec) for n in ("llama", "gpt2"))
    assert len(llama) == 3 * 7
    assert len(gpt2) == 3 * 4  # c_attn is one layer there
    assert select(llama, ["all-linear"]) == llama
    few = select(llama, ["q_proj", "mlp.up_proj", "model.layers.1.self_attn.o_proj"])
    assert [p.linear.removeprefix("decoder.blocks.") for p in few] == [
        *("0.qkv", "0.mlp_in", "1.qkv", "1.attn_out", "1.mlp_in", "2.qkv", "2.mlp_in")
    ]
    assert select(llama, [r"model\.layers\.[02]\..*(q_proj|up_proj)"]) == [
        p for p in llama if ".1." not in p.module and p.module.endswith(("q_proj", "up_proj"))
    ]
    assert target_modules(llama, few) == [*("model.layers.1.self_attn.o_proj", "q_proj", "up_proj")]
    # GPT-2 has two layers called c_proj in each block.
    assert target_modules(gpt2, select(gpt2, ["c_proj"])) == ["c_proj"]
    assert target_modules(gpt2, select(gpt2, ["attn.c_proj"])) == ["attn.c_proj"]
    with pytest.raises(UserError, match="LoRA target 'qkv' is no linear layer.*some of q_proj, k"):
        select(llama, ["q_proj", "qkv"])
    for wrong in ("layers", "[qkv", "layers.*q_proj"):  # a part of a name is none
        with pytest.raises(UserError, match="regular expression of whole names such as model"):
            select(llama, [wrong])
    with pytest.raises(UserError, match="'lm_head'"):
        load_causal_lm(tmp_path / "llama", lora=LoRAConfig(target_modules=("lm_head",)))


def test_parts_without_an_adapter_stay_without(tmp_path: Path) -> None:
    save_causal("llama", tmp_path)
    config = LoRAConfig(2, 8.0, target_modules=("v_proj", "gate_proj"))
    model = load_causal_lm(tmp_path, lora=config)
    train(model, steps=3, lr=0.05, weight_decay=0.1)
    for name, linear in adapted_linears(model):
        adapted = {"qkv": {2}, "mlp_in": {0}}[name.rpartition(".")[2]]
        for part in range(len(linear.lora_splits)):
            assert all(bool(f.any()) == (part in adapted) for f in factors(linear, part)), name


def test_one_pair_where_transformers_has_one_layer(tmp_path: Path) -> None:
    save_causal("gpt2", tmp_path)
    model = load_causal_lm(tmp_path, lora=LoRAConfig(2, 8.0))
    qkv = model.decoder.blocks[0].qkv
    assert qkv.splits == (48, 48, 48)
    assert qkv.lora_splits == (144,)
    assert qkv.lora_a.shape == (2, 48)


def test_dropout_is_for_training_alone(tmp_path: Path) -> None:
    save_causal("qwen2", tmp_path)
    config = LoRAConfig(4, 16.0)
    plain = load_causal_lm(tmp_path, lora=config)
    train(plain, lr=0.05)
    dropping = load_causal_lm(tmp_path, lora=LoRAConfig(4, 16.0, dropout=0.4))
    dropping.load_state_dict(plain.state_dict())
    assert not dropping.training  # as it was loaded
    assert torch.equal(loss_of(dropping), loss_of(plain))
    dropping.train()
    qkv, x = dropping.decoder.blocks[0].qkv, torch.ones(400, 48)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        dropped = qkv(x)
        assert loss_of(dropping) != loss_of(plain)
    error = dropped.std(dim=0) / math.sqrt(len(x))
    assert (error > 0).all()
    gap = (dropped.mean(dim=0) - plain.decoder.blocks[0].qkv(x[:1])[0]).abs()
    assert (gap < 5 * error).all()  # unbiased
    with adapters_disabled(dropping):
        assert torch.equal(loss_of(dropping), loss_of(load_causal_lm(tmp_path)))


def test_gradients_through_dropout_are_exact(tmp_path: Path) -> None:
    """Against the same zeros drawn again, in plain torch."""
    save_causal("llama", tmp_path)
    model = load_causal_lm(tmp_path, lora=LoRAConfig(4, 16.0, dropout=0.4)).train()
    train(model, lr=0.05)
    qkv = model.decoder.blocks[0].qkv
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(0), requires_grad=True)
    wanted = (x, qkv.lora_a, qkv.lora_b)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        ours = torch.autograd.grad(qkv(x).square().sum(), wanted)
        torch.manual_seed(1)
        dropped = torch.nn.functional.dropout(x, 0.4)
        pairs = zip(qkv.lora_a.chunk(3), qkv.lora_b.split(qkv.splits), strict=True)
        low = torch.cat([dropped @ a.T @ b.T for a, b in pairs], dim=-1)
        plain = x @ qkv.weight.T + 4.0 * low
        theirs = torch.autograd.grad(plain.square().sum(), wanted)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*no native kernel for torch.bfloat16")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_a_hundred_cycles_leave_the_base_alone(
    layout: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merge into the weights, compute, take out again, train."""
    monkeypatch.delenv("HYBRID_KERNELS_REQUIRE_NATIVE", raising=False)  # bf16 has no kernels
    save_causal(layout, tmp_path)
    model = load_causal_lm(tmp_path, dtype, lora=LoRAConfig(3, 12.0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    base, moved = frozen(model), 0
    tolerance = 1e-4 if dtype == "float32" else 0.2
    for cycle in range(100):
        with adapters_merged(model), torch.no_grad():
            merged = loss_of(model)
            moved += any(
                not torch.equal(bytes_of(p), base[n])
                for n, p in model.named_parameters()
                if n in base
            )
        now = frozen(model)
        assert all(torch.equal(now[name], base[name]) for name in base), cycle
        loss = loss_of(model)
        assert (loss - merged).abs() < tolerance
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert moved == 99  # B starts as zero
    assert loss_of(model) < 0.7 * loss_of(load_causal_lm(tmp_path, dtype))


def test_the_base_comes_back_after_a_failure(tmp_path: Path) -> None:
    save_causal("llama", tmp_path)
    model = load_causal_lm(tmp_path, lora=LoRAConfig(3, 12.0))
    train(model, lr=0.1)
    base = frozen(model)
    with pytest.raises(KeyboardInterrupt), adapters_merged(model):
        raise KeyboardInterrupt
    now = frozen(model)
    assert all(torch.equal(now[name], base[name]) for name in base)
    assert all(linear.lora_enabled for _, linear in adapted_linears(model))
    with adapters_disabled(model), adapters_merged(model):  # nothing to merge
        now = frozen(model)
        assert all(torch.equal(now[name], base[name]) for name in base)
        assert not any(linear.lora_enabled for _, linear in adapted_linears(model))
