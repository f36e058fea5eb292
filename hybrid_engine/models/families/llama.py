"""Llama and its kin: Llama 1 to 3, SmolLM2, Mistral, Qwen2, Qwen3."""

from __future__ import annotations

import re
from typing import Any

from ..spec import DecoderSpec
from .base import Entry, Family, activation, reject, rope_from_config, weight_and_bias


def spec_from_config(config: Any) -> DecoderSpec:
    kind = config.model_type
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention_bias = getattr(config, "attention_bias", False)
    return DecoderSpec(
        family="llama",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        embed_dim=config.hidden_size,
        num_layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        intermediate_size=config.intermediate_size,
        max_positions=config.max_position_embeddings,
        norm="rms_norm",
        norm_eps=config.rms_norm_eps,
        positions="rotary",
        activation=activation(config.hidden_act),
        attention_scale=head_dim**-0.5,
        gated_mlp=True,
        qkv_bias=attention_bias or kind == "qwen2",
        attn_out_bias=attention_bias,
        mlp_bias=getattr(config, "mlp_bias", False),
        qk_norm=kind == "qwen3",
        tied_head=config.tie_word_embeddings,
        sliding_window=_window(config),
        rope=rope_from_config(config, head_dim),
    )


def _window(config: Any) -> int:
    """Keys a query sees in every layer; 0 for all. Only Mistral and Qwen know windows."""
    window = getattr(config, "sliding_window", None) or 0
    layers = set(getattr(config, "layer_types", None) or [])
    if config.model_type == "mistral":
        reject(layers == {"full_attention", "sliding_attention"}, "windows in some layers only")
        return window
    reject(len(layers) > 1, "sliding windows in some layers only")
    reject(not layers <= {"full_attention", "sliding_attention"}, f"attention layers {layers}")
    return window if layers == {"sliding_attention"} else 0


def entries(spec: DecoderSpec) -> list[Entry]:
    table = [Entry("embed_tokens.weight", ("embed_tokens.weight",))]
    for i in range(spec.num_layers):
        table += _block(spec, f"blocks.{i}", f"layers.{i}")
    return [*table, Entry("final_norm.weight", ("norm.weight",))]


def _block(spec: DecoderSpec, ours: str, theirs: str) -> list[Entry]:
    attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
    qkv = tuple(f"{attention}.{name}_proj" for name in "qkv")
    gate_up = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
    table = [
        Entry(f"{ours}.attn_norm.weight", (f"{theirs}.input_layernorm.weight",)),
        Entry(f"{ours}.mlp_norm.weight", (f"{theirs}.post_attention_layernorm.weight",)),
        *weight_and_bias(f"{ours}.qkv", qkv, spec.qkv_bias, rows=spec.qkv_splits),
        *weight_and_bias(f"{ours}.attn_out", (f"{attention}.o_proj",), spec.attn_out_bias),
        *weight_and_bias(f"{ours}.mlp_in", gate_up, spec.mlp_bias, rows=spec.mlp_in_splits),
        *weight_and_bias(f"{ours}.mlp_out", (f"{mlp}.down_proj",), spec.mlp_bias),
    ]
    if spec.qk_norm:
        for name in ("q_norm", "k_norm"):
            table.append(Entry(f"{ours}.{name}.weight", (f"{attention}.{name}.weight",)))
    return table


LLAMA = Family(
    name="llama",
    architectures={
        kind: (f"{stem}ForCausalLM", f"{stem}ForSequenceClassification")
        for kind, stem in {
            "llama": "Llama",
            "mistral": "Mistral",
            "qwen2": "Qwen2",
            "qwen3": "Qwen3",
        }.items()
    },
    prefix="model.",
    spec_from_config=spec_from_config,
    entries=entries,
    ignored=re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$"),
)
