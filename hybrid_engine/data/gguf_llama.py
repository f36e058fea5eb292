"""A Llama-type GGUF file as a Hugging Face fp32 directory.

The tensors are dequantised with numpy by the `gguf` package and renamed here, which takes seconds;
transformers' own GGUF loading gives the same bits in most of a minute. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from hybrid_engine.errors import UserError

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
CONTROL_TOKEN = 3  # GGUF token type


def convert(gguf_file: Path, directory: Path) -> None:
    """Write config, generation config, fp32 safetensors and tokenizer of ``gguf_file`` to the new
    ``directory``.

    Raises UserError without the `gguf` package, and for a file of another architecture.
    """
    gguf = import_gguf()
    reader = gguf.GGUFReader(gguf_file)

    def read(name: str) -> Any:
        return reader.fields[name].contents()

    if read("general.architecture") != "llama" or read("tokenizer.ggml.model") != "gpt2":
        raise UserError(
            f"{gguf_file}: only Llama models with a byte-level BPE tokenizer can be converted"
        )
    config = model_config(read)
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    generation_config(config).save_pretrained(directory)
    tokenizer(read).save_pretrained(directory)
    tensors = {
        hf_name(tensor.name): hf_weight(gguf, tensor, config)
        for tensor in reader.tensors
        if not tensor.name.startswith("rope_")
    }
    if ("lm_head.weight" not in tensors) != config.tie_word_embeddings:
        raise UserError(f"{gguf_file}: the output matrix does not agree with the metadata")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise UserError(
            "converting the demo model needs the package gguf: pip install '.[demo]'"
        ) from None
    return gguf


def model_config(read: Any) -> LlamaConfig:
    width, heads = read("llama.embedding_length"), read("llama.attention.head_count")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=read("llama.vocab_size"),
        hidden_size=width,
        intermediate_size=read("llama.feed_forward_length"),
        num_hidden_layers=read("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=read("llama.attention.head_count_kv"),
        head_dim=width // heads,
        max_position_embeddings=read("llama.context_length"),
        rms_norm_eps=read("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": read("llama.rope.freq_base")},
        bos_token_id=read("tokenizer.ggml.bos_token_id"),
        eos_token_id=read("tokenizer.ggml.eos_token_id"),
        pad_token_id=read("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
        dtype="float32",
    )


def generation_config(config: LlamaConfig) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


def hf_name(name: str) -> str:
    block = BLOCK.fullmatch(name)
    if block:
        return f"model.layers.{block[1]}.{NAMES[block[2]]}.weight"
    return f"{NAMES[name.removesuffix('.weight')]}.weight"


def hf_weight(gguf: ModuleType, tensor: Any, config: LlamaConfig) -> torch.Tensor:
    """fp32, ``[out, in]``.

    GGUF interleaves the two halves of the rotary pairs of q and k; Hugging Face keeps them apart.
    """
    weight = gguf.dequantize(tensor.data, tensor.tensor_type)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    block = BLOCK.fullmatch(tensor.name)
    if block and block[2] in heads:
        pairs = weight.reshape(heads[block[2]], -1, 2, config.hidden_size)
        weight = pairs.swapaxes(1, 2).reshape(weight.shape)
    return torch.from_numpy(np.require(weight, np.float32, ["C", "W"]))


def tokenizer(read: Any) -> PreTrainedTokenizerFast:
    tokens = read("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in read("tokenizer.ggml.merges")]
    core = Tokenizer(
        models.BPE(vocab={token: at for at, token in enumerate(tokens)}, merges=merges)
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    types = read("tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    core.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )

    def token(role: str) -> str:
        return tokens[read(f"tokenizer.ggml.{role}_token_id")]

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=token("bos"),
        eos_token=token("eos"),
        pad_token=token("padding"),
        unk_token=token("unknown"),
        model_max_length=read("llama.context_length"),
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = read("tokenizer.chat_template")
    return wrapped
