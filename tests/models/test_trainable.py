"""What trains: LoRA adapters, top layers; and the frozen prefix that models share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybrid_engine.models import (
    LoRAConfig,
    adapted_linears,
    compute_trunk,
    frozen_blocks,
    last_rows,
    load_causal_lm,
    load_scalar_model,
    pack,
    response_rows,
    save_model,
    share_frozen_trunk,
)

from .peers import ONE_OF_EACH_FAMILY, ragged, save_causal


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def fill_adapters(model: torch.nn.Module) -> None:
    """Values as after training: B starts at zero, which would hide every mistake."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, linear in adapted_linears(model):
            linear.lora_b.copy_(torch.randn(linear.lora_b.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("layout", [*ONE_OF_EACH_FAMILY, "llama-biases"])
def test_merged_save_equals_the_unmerged_forward(layout: str, tmp_path: Path) -> None:
    save_causal(layout, tmp_path / "in")
    base = load_causal_lm(tmp_path / "in")
    model = load_causal_lm(tmp_path / "in", lora=LoRAConfig(r=3, alpha=6.0))
    batch = pack(ragged())
    with torch.no_grad():
        torch.testing.assert_close(model.logits(batch), base.logits(batch), rtol=0, atol=1e-6)
        fill_adapters(model)
        unmerged = model.logits(batch)
        assert (unmerged - base.logits(batch)).abs().max() > 0.05
        before = {name: p.clone() for name, p in model.named_parameters()}
        save_model(model, tmp_path / "out")
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]), name
        merged = load_causal_lm(tmp_path / "out").logits(batch)
    torch.testing.assert_close(merged, unmerged, rtol=0, atol=1e-5)


def test_lora_trains_the_adapters_alone(tmp_path: Path) -> None:
    save_causal("llama-tied", tmp_path)
    config = LoRAConfig(r=2, alpha=4.0, target_modules=("q_proj", "k_proj", "v_proj", "down_proj"))
    torch.manual_seed(98)
    model = load_causal_lm(tmp_path, lora=config)
    expected = {
        f"decoder.blocks.{i}.{target}.{part}"
        for i in range(3)
        for target in ("qkv", "mlp_out")
        for part in ("lora_a", "lora_b")
    }
    assert trainable(model) == expected
    block = model.decoder.blocks[0]
    assert block.qkv.lora_a.shape == (3 * 2, 48)  # one pair for each of q, k, v
    assert block.qkv.lora_b.shape == (48 + 16 + 16, 2)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = load_causal_lm(tmp_path, lora=config)
    assert torch.equal(torch.get_rng_state(), state)  # adapters draw from a generator of their own
    for (name, a), (_, b) in zip(adapted_linears(model), adapted_linears(again), strict=True):
        assert torch.equal(a.lora_a, b.lora_a), name
        assert not a.lora_b.any()
    other = load_causal_lm(tmp_path, lora=config, seed=1)
    for name, linear in adapted_linears(other):
        assert not torch.equal(linear.lora_a, model.get_submodule(name).lora_a), name
    reward = load_scalar_model(tmp_path, lora=config)
    assert trainable(reward) == {*expected, "score.weight"}


def test_lora_gradients_are_those_of_the_merged_weight(tmp_path: Path) -> None:
    """d/dA = s B^T dW and d/dB = s dW A^T, split by split, with dW from a model without LoRA."""
    save_causal("llama", tmp_path / "in")
    model = load_causal_lm(tmp_path / "in", lora=LoRAConfig(r=2, alpha=3.0))
    fill_adapters(model)
    save_model(model, tmp_path / "out")
    merged = load_causal_lm(tmp_path / "out")
    batch = pack(ragged())
    rows, targets = response_rows(batch, [1] * batch.num_sequences)
    for each in (model, merged):
        each(batch, rows, targets).logprobs.sum().backward()
    linears = dict(merged.named_modules())
    for name, linear in adapted_linears(model):
        splits = linear.lora_splits
        pieces = zip(
            linears[name].weight.grad.split(splits),
            linear.lora_a.split(2),
            linear.lora_a.grad.split(2),
            linear.lora_b.split(splits),
            linear.lora_b.grad.split(splits),
            strict=True,
        )
        for dense, a, a_grad, b, b_grad in pieces:
            torch.testing.assert_close(a_grad, 1.5 * b.T @ dense, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(b_grad, 1.5 * dense @ a.T, rtol=1e-3, atol=1e-4)


def test_top_layers_leave_the_rest_frozen(tmp_path: Path) -> None:
    save_causal("gpt2", tmp_path)
    model = load_causal_lm(tmp_path, trainable_layers=1)
    assert {name.split(".")[1] for name in trainable(model)} == {"blocks", "final_norm"}
    assert {n for n in trainable(model) if "blocks" in n} == {
        f"decoder.blocks.2.{name}" for name, _ in model.decoder.blocks[2].named_parameters()
    }
    assert frozen_blocks(model) == 2
    assert "score.weight" in trainable(load_scalar_model(tmp_path, trainable_layers=2))
    assert frozen_blocks(load_causal_lm(tmp_path)) == 0


@pytest.mark.parametrize("layout", ONE_OF_EACH_FAMILY)
def test_a_shared_trunk_gives_the_same_bits_as_the_whole_forward(
    layout: str, tmp_path: Path
) -> None:
    save_causal(layout, tmp_path)
    policy = load_causal_lm(tmp_path, trainable_layers=1)
    reference = load_causal_lm(tmp_path).requires_grad_(False)
    value = load_scalar_model(tmp_path, trainable_layers=1)
    assert share_frozen_trunk([policy, reference, value]) == 2

    first, second = (m.decoder.blocks[1].qkv.weight.data_ptr() for m in (policy, value))
    assert first == second
    kept_apart = (m.decoder.blocks[2].qkv.weight.data_ptr() for m in (policy, reference))
    assert len(set(kept_apart)) == 2

    batch = pack(ragged())
    rows, targets = response_rows(batch, [1] * batch.num_sequences)
    trunk = compute_trunk(policy, batch, 2)
    for model in (policy, reference):
        whole, continued = model(batch, rows, targets), model(batch, rows, targets, trunk=trunk)
        assert torch.equal(whole.logprobs, continued.logprobs)
        assert torch.equal(whole.entropies, continued.entropies)
    assert torch.equal(value(batch, last_rows(batch)), value(batch, last_rows(batch), trunk=trunk))


def test_gradients_do_not_depend_on_the_trunk(tmp_path: Path) -> None:
    save_causal("llama", tmp_path)
    models = [load_causal_lm(tmp_path, trainable_layers=1) for _ in range(2)]
    batch = pack(ragged())
    rows, targets = response_rows(batch, [1] * batch.num_sequences)
    for model, trunk in zip(models, (None, compute_trunk(models[0], batch, 2)), strict=True):
        model(batch, rows, targets, trunk=trunk).logprobs.sum().backward()
    for (name, a), (_, b) in zip(*(m.named_parameters() for m in models), strict=True):
        if a.requires_grad:
            assert torch.equal(a.grad, b.grad), name
        else:
            assert a.grad is None
            assert b.grad is None


def test_the_trunk_ends_where_a_model_differs_or_trains(tmp_path: Path) -> None:
    save_causal("llama", tmp_path)
    policy, other = (load_causal_lm(tmp_path, trainable_layers=1) for _ in range(2))
    with torch.no_grad():
        other.decoder.blocks[1].mlp_norm.weight[5] += 1e-6
    assert share_frozen_trunk([policy, other]) == 1
    with torch.no_grad():
        other.decoder.embed_tokens.weight[3, 3] *= -1
    assert share_frozen_trunk([policy, load_causal_lm(tmp_path)]) == 0
    assert share_frozen_trunk([policy]) == 0


def test_equal_bytes_of_unequal_arithmetic_are_not_a_trunk(tmp_path: Path) -> None:
    save_causal("mistral", tmp_path / "whole")
    save_causal("mistral-window", tmp_path / "window")
    models = [load_causal_lm(tmp_path / n, trainable_layers=1) for n in ("whole", "window")]
    assert share_frozen_trunk(models) == 0


def test_a_trunk_beyond_a_trainable_parameter_is_refused(tmp_path: Path) -> None:
    save_causal("llama", tmp_path)
    model = load_causal_lm(tmp_path, trainable_layers=2)
    batch = pack(ragged())
    with pytest.raises(ValueError, match=r"trunk\.stop is 2, but a parameter before that"):
        model.decoder(batch, compute_trunk(model, batch, 2))
    trunk = compute_trunk(model, pack(ragged(lengths=(4,))), 1)
    with pytest.raises(ValueError, match=r"trunk\.hidden has shape \[4, 48\]; expected \[29, 48\]"):
        model.decoder(batch, trunk)
