"""A Llama directory of Hugging Face as a GGUF file without a vocabulary, for llama.cpp.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from transformers import AutoConfig

from hybrid_engine.data.gguf_llama import NAMES

HF_NAMES = {hf: name for name, hf in NAMES.items()}


def write_gguf(source: Path, target: Path, dtype: str) -> Path:
    """`dtype` of the matrices is "f32" or "f16"; norm weights stay float32."""
    import gguf

    config: Any = AutoConfig.from_pretrained(source)
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    with safe_open(source / "model.safetensors", "np") as tensors:
        names: list[str] = tensors.keys()
        for name in names:
            weight = _gguf_weight(name, tensors.get_tensor(name), config)
            matrix = weight.ndim == 2 and dtype == "f16"
            writer.add_tensor(_gguf_name(name), weight.astype(np.float16 if matrix else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _gguf_name(name: str) -> str:
    name = name.removesuffix(".weight")
    if name.startswith("model.layers."):
        _, _, layer, part = name.split(".", 3)
        return f"blk.{layer}.{HF_NAMES[part]}.weight"
    return f"{HF_NAMES[name]}.weight"


def _gguf_weight(name: str, weight: Any, config: Any) -> Any:
    """GGUF's rotary pairs are neighbours, Hugging Face's lie half a head apart."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, count in heads.items():
        if f".{part}." in name:
            halves = weight.reshape(count, 2, -1, weight.shape[1])
            return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
    return weight
