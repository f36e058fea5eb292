"""A frozen base in few bits, by bitsandbytes, which computes on the CPU too."""

from __future__ import annotations

import sys
from operator import attrgetter
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hybrid_engine.config import OptimizerConfig
from hybrid_engine.engine import HybridEngine, SamplingParams, TrainEngine
from hybrid_engine.errors import UserError
from hybrid_engine.models import (
    CausalLM,
    LoRAConfig,
    adapted_linears,
    adapters_disabled,
    adapters_merged,
    load_causal_lm,
    load_scalar_model,
    pack,
    response_rows,
    save_adapter,
    save_model,
)
from hybrid_engine.models.quantized import quantize_base, weight_name
from tests.models.peers import ragged, save_causal, worst_logit_gap
from tests.tiny import make_tiny_model

pytest.importorskip("bitsandbytes")

LAYOUTS = ("llama", "opt", "gpt2")
LORA = LoRAConfig(4, 8.0)
# Of the largest weight of a block: half the widest gap between the type's values, with their own
# rounding (NormalFloat-4: -1 to -0.696; dynamic 8 bits: 0.9929 to 1 and alike).
WORST = {4: 0.153, 8: 0.0075}


def load(layout: str, directory: Path, bits: int = 4, dtype: str = "float32") -> CausalLM:
    """With adapters that do something."""
    if layout:
        save_causal(layout, directory / "base")
    model = load_causal_lm(directory / "base", dtype, LORA, base_bits=bits)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, linear in adapted_linears(model):
            linear.lora_b.copy_(torch.randn(linear.lora_b.shape, generator=generator) * 0.2)
    return model


def widened(model: CausalLM, directory: Path) -> CausalLM:
    """An ordinary model that holds the weights that a quantized one computes with."""
    plain = load_causal_lm(directory / "base", model.head.weight.dtype, LORA)
    with torch.no_grad():
        for name, _ in model.named_parameters():
            weight = weight_name(name) or name
            plain.get_parameter(weight).copy_(attrgetter(weight)(model))
    return plain


def gradients(model: CausalLM) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batch = pack(ragged())
    rows, targets = response_rows(batch, [1] * batch.num_sequences)
    logprobs = model(batch, rows, targets).logprobs
    logprobs.sum().backward()
    return logprobs.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_near_and_small(layout: str, bits: int, tmp_path: Path) -> None:
    model = load(layout, tmp_path, bits)
    plain = load_causal_lm(tmp_path / "base")
    codes = {n: p for n, p in model.named_parameters() if weight_name(n)}
    assert len(codes) == 3 * 4
    for name, code in codes.items():
        exact = plain.get_parameter(weight_name(name))
        found = attrgetter(weight_name(name))(model)
        assert found.dtype == exact.dtype
        assert 0 < (found - exact).abs().max() <= WORST[bits] * exact.abs().max()
        scales = attrgetter(name.removesuffix("original") + "0")(model).state.absmax
        assert 8 * (code.nbytes + scales.nbytes) <= {4: 4.6, 8: 8.2}[bits] * exact.numel()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_computes_with_those_weights(
    layout: str, dtype: str, checkpointing: bool, tmp_path: Path
) -> None:
    """Forward and gradients are those of the ordinary model with the same weights, bit for bit."""
    model = load(layout, tmp_path, dtype=dtype)
    plain = widened(model, tmp_path)
    model.gradient_checkpointing = checkpointing
    ours, theirs = gradients(model), gradients(plain)
    assert torch.equal(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert torch.equal(ours[1][name], gradient), name


def test_weights_are_not_kept_for_the_backward_pass(tmp_path: Path) -> None:
    model, saved = load("llama", tmp_path), []
    shapes = {linear.weight.shape for _, linear in adapted_linears(model)}
    hooks = torch.autograd.graph.saved_tensors_hooks
    for each in (model, widened(model, tmp_path)):
        saved.append([])
        with hooks(lambda t: saved[-1].append(t.shape) or t, lambda t: t):
            gradients(each)
    assert not shapes & set(saved[0])
    assert shapes <= set(saved[1])


def test_dropout_acts_beside_it(tmp_path: Path) -> None:
    model = load("llama", tmp_path).train()
    plain = widened(model, tmp_path).train()
    for each in (model, plain):
        for _, linear in adapted_linears(each):
            linear.lora_dropout = 0.4
        torch.manual_seed(0)
        each.found = gradients(each)
    assert torch.equal(model.found[0], plain.found[0])
    for name, gradient in plain.found[1].items():
        assert torch.equal(model.found[1][name], gradient), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generating_is_the_training_forward(dtype: str, tmp_path: Path) -> None:
    model = load("llama", tmp_path, dtype=dtype)
    config = OptimizerConfig(learning_rate=0.01, schedule="constant", warmup_ratio=0.0)
    engine = HybridEngine(model, None, TrainEngine(model, config, 1, verify_frozen=True))
    params, prompts = SamplingParams(max_new_tokens=9, ignore_eos=True), ragged(1, (4, 9))
    for _ in range(2):
        rollout = engine.generate(prompts, params)
        alone = HybridEngine(widened(model, tmp_path), None).generate(prompts, params)
        assert (rollout.tokens, rollout.logprobs) == (alone.tokens, alone.logprobs)
        scored = engine.token_logprobs(rollout.sequences, rollout.prompt_lengths)
        assert [row.tolist() for row in scored] == rollout.logprobs
        batch = pack(rollout.sequences)
        rows, targets = response_rows(batch, rollout.prompt_lengths)
        with engine.training():
            trained = engine.train_engine
            trained.backward(-trained(batch, rows, targets).logprobs.sum(), 18)
            assert trained.step() > 0
    with adapters_disabled(model):
        base = engine.generate(prompts, params)
    assert base.logprobs != rollout.logprobs


def test_transformers_and_peft_quantize_to_the_same_model(tmp_path: Path) -> None:
    """Of layers whose rows are whole blocks: the fused ones then have the blocks of their parts."""
    make_tiny_model(tmp_path / "base")
    model = load("", tmp_path)
    save_adapter(model, tmp_path / "adapter")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    # Training mode: for inference on some CPUs bitsandbytes has kernels in bfloat16.
    peer = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").train()
    assert worst_logit_gap(model, peer, ragged(), "left") < 1e-5
    exact = load_causal_lm(tmp_path / "adapter")
    with torch.no_grad():
        gap = (model.logits(pack(ragged())) - exact.logits(pack(ragged()))).abs().max()
    assert gap > 1e-3


def test_it_is_saved_with_the_weights_that_it_has(tmp_path: Path) -> None:
    model = load("gpt2", tmp_path)
    save_model(model, tmp_path / "whole")
    batch = pack(ragged())
    whole = load_causal_lm(tmp_path / "whole")
    with torch.no_grad():
        torch.testing.assert_close(whole.logits(batch), model.logits(batch), rtol=0, atol=1e-5)
    again = load_causal_lm(tmp_path / "whole", lora=LORA, base_bits=8)
    scalar = load_scalar_model(tmp_path / "whole", lora=LORA, base_bits=8)
    assert torch.equal(again.decoder.blocks[0].qkv.weight, scalar.decoder.blocks[0].qkv.weight)


def test_casts_leave_codes_and_scales_alone(tmp_path: Path) -> None:
    """DeepSpeed casts the modules that it is given."""
    model = load("llama", tmp_path)
    qkv = model.decoder.blocks[0].qkv
    before = qkv.weight.clone()
    model.to(torch.bfloat16).to("cpu")
    assert qkv.bias is None or qkv.bias.dtype == torch.bfloat16
    assert qkv.lora_a.dtype == torch.bfloat16
    assert torch.equal(qkv.weight, before)


def test_what_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("llama", tmp_path)
    with (
        pytest.raises(UserError, match="cannot be merged into a quantized"),
        adapters_merged(model),
    ):
        pass
    with pytest.raises(UserError, match="cannot be merged into a quantized base"):
        HybridEngine(model, None, merge_adapters=True).generate([[1]])
    with pytest.raises(UserError, match="which ZeRO stage 3 does not keep"):
        TrainEngine(model, OptimizerConfig(), 1, {"zero_optimization": {"stage": 3}})
    with pytest.raises(UserError, match="4 bits cannot be trained; add an adapter"):
        load_causal_lm(tmp_path / "base", base_bits=4)
    with pytest.raises(UserError, match="a base in 5 bits: give 4 or 8"):
        load_causal_lm(tmp_path / "base", lora=LORA, base_bits=5)
    with pytest.raises(ValueError, match="only a frozen base"):
        quantize_base(load_causal_lm(tmp_path / "base"), 4)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="needs bitsandbytes .*pip install bitsandbytes"):
        load_causal_lm(tmp_path / "base", lora=LORA, base_bits=4)
