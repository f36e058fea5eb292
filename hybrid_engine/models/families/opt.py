"""OPT from 125m to 175b, 350m's post-norm and projected embedding among them."""

from __future__ import annotations

import re
from typing import Any

from ..spec import DecoderSpec
from .base import Entry, Family, activation, reject, weight_and_bias

_POSITION_OFFSET = 2  # the first two rows of the position table were fairseq's padding rows
_NORM_EPS = 1e-5  # torch's default; the config has no field for it


def spec_from_config(config: Any) -> DecoderSpec:
    reject(not config.layer_norm_elementwise_affine, "layer norms without weights")
    head_dim = config.hidden_size // config.num_attention_heads
    pre_norm = config.do_layer_norm_before
    return DecoderSpec(
        family="opt",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        embed_dim=config.word_embed_proj_dim,
        num_layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=head_dim,
        intermediate_size=config.ffn_dim,
        max_positions=config.max_position_embeddings,
        norm="layer_norm",
        norm_eps=_NORM_EPS,
        norm_position="pre" if pre_norm else "post",
        final_norm=pre_norm and not config._remove_final_layer_norm,
        positions="learned",
        position_offset=_POSITION_OFFSET,
        activation=activation(config.activation_function),
        attention_scale=head_dim**-0.5,
        qkv_bias=config.enable_bias,
        attn_out_bias=config.enable_bias,
        mlp_bias=config.enable_bias,
        tied_head=config.tie_word_embeddings,
    )


def entries(spec: DecoderSpec) -> list[Entry]:
    names = ["embed_tokens", "embed_positions"]
    if spec.embed_dim != spec.hidden_size:
        names += ["project_in", "project_out"]
    table = [Entry(f"{name}.weight", (f"decoder.{name}.weight",)) for name in names]
    for i in range(spec.num_layers):
        table += _block(spec, f"blocks.{i}", f"decoder.layers.{i}")
    if spec.final_norm:
        table += weight_and_bias("final_norm", ("decoder.final_layer_norm",), True)
    return table


def _block(spec: DecoderSpec, ours: str, theirs: str) -> list[Entry]:
    attention = f"{theirs}.self_attn"
    qkv = tuple(f"{attention}.{name}_proj" for name in "qkv")
    return [
        *weight_and_bias(f"{ours}.attn_norm", (f"{theirs}.self_attn_layer_norm",), True),
        *weight_and_bias(f"{ours}.qkv", qkv, spec.qkv_bias, rows=spec.qkv_splits),
        *weight_and_bias(f"{ours}.attn_out", (f"{attention}.out_proj",), spec.attn_out_bias),
        *weight_and_bias(f"{ours}.mlp_norm", (f"{theirs}.final_layer_norm",), True),
        *weight_and_bias(f"{ours}.mlp_in", (f"{theirs}.fc1",), spec.mlp_bias),
        *weight_and_bias(f"{ours}.mlp_out", (f"{theirs}.fc2",), spec.mlp_bias),
    ]


OPT = Family(
    name="opt",
    architectures={"opt": ("OPTForCausalLM", "OPTForSequenceClassification")},
    prefix="model.",
    spec_from_config=spec_from_config,
    entries=entries,
    ignored=re.compile(r"(?!)"),
)
