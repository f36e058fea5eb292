"""GPT-2, small to XL. Its linear layers are Conv1D: the checkpoint keeps them as [in, out]."""

from __future__ import annotations

import re
from typing import Any

from ..spec import DecoderSpec
from .base import Entry, Family, activation, reject, weight_and_bias


def spec_from_config(config: Any) -> DecoderSpec:
    reject(config.add_cross_attention, "cross attention")
    reject(config.scale_attn_by_inverse_layer_idx, "attention scaled by the layer's index")
    head_dim = config.n_embd // config.n_head
    return DecoderSpec(
        family="gpt2",
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        embed_dim=config.n_embd,
        num_layers=config.n_layer,
        heads=config.n_head,
        kv_heads=config.n_head,
        head_dim=head_dim,
        intermediate_size=config.n_inner or 4 * config.n_embd,
        max_positions=config.n_positions,
        norm="layer_norm",
        norm_eps=config.layer_norm_epsilon,
        positions="learned",
        activation=activation(config.activation_function),
        attention_scale=head_dim**-0.5 if config.scale_attn_weights else 1.0,
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        tied_head=config.tie_word_embeddings,
    )


def entries(spec: DecoderSpec) -> list[Entry]:
    table = [
        Entry("embed_tokens.weight", ("wte.weight",)),
        Entry("embed_positions.weight", ("wpe.weight",)),
    ]
    for i in range(spec.num_layers):
        ours, theirs = f"blocks.{i}", f"h.{i}"
        table += weight_and_bias(f"{ours}.attn_norm", (f"{theirs}.ln_1",), True)
        table += weight_and_bias(f"{ours}.mlp_norm", (f"{theirs}.ln_2",), True)
        for name, source in (
            ("qkv", "attn.c_attn"),
            ("attn_out", "attn.c_proj"),
            ("mlp_in", "mlp.c_fc"),
            ("mlp_out", "mlp.c_proj"),
        ):
            table += weight_and_bias(
                f"{ours}.{name}", (f"{theirs}.{source}",), True, transposed=True
            )
    return [*table, *weight_and_bias("final_norm", ("ln_f",), True)]


GPT2 = Family(
    name="gpt2",
    architectures={"gpt2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification")},
    prefix="transformer.",
    spec_from_config=spec_from_config,
    entries=entries,
    ignored=re.compile(r"\.attn\.(bias|masked_bias)$"),
)
