"""A seeded random model small enough for any test, built from code alone: no download, no committed
weights.

The tokenizer is byte level without merges, so every byte is one token and any text round-trips.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

BOS, EOS, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
# Qwen2's tokenizer class adds this token when it is missing, and would outgrow the model.
END_OF_TEXT = "<|endoftext|>"
CONTEXT = 512
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny_tokenizer(pad_is_eos: bool = True, add_bos: bool = False) -> PreTrainedTokenizerFast:
    """256 bytes, then BOS 256, EOS 257, PAD 258, END_OF_TEXT 259.

    ``add_bos`` makes plain encoding start with BOS, as Llama's tokenizer does.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate([*alphabet, BOS, EOS, PAD, END_OF_TEXT])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if add_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocab[BOS])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS if pad_is_eos else PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [PAD, END_OF_TEXT]})
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_config(family: str, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """Two layers, hidden 64, 4 heads (2 key-value heads where the family has them), feed-forward
    128.
    """
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": CONTEXT,
    }
    modern = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        **special,
    }
    if family == "llama":
        return LlamaConfig(**modern, tie_word_embeddings=True)
    if family == "mistral":
        return MistralConfig(**modern, sliding_window=None)
    if family == "qwen2":
        return Qwen2Config(**modern, tie_word_embeddings=True)
    if family == "qwen3":
        return Qwen3Config(**modern, head_dim=16, tie_word_embeddings=True)
    if family == "opt":
        return OPTConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=128,
            word_embed_proj_dim=64,
            dropout=0.0,
            **special,
        )
    if family == "gpt2":
        del special["max_position_embeddings"]
        return GPT2Config(
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_inner=128,
            n_positions=CONTEXT,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **special,
        )
    raise ValueError(
        f"no tiny model of family {family!r}; take llama, mistral, qwen2, qwen3, opt or gpt2"
    )


def make_tiny_model(
    directory: str | Path,
    family: str = "llama",
    seed: int = 0,
    pad_is_eos: bool = True,
    add_bos: bool = False,
) -> Path:
    """Write a Hugging Face directory (fp32 weights, config, generation config, tokenizer with chat
    template).
    """
    directory = Path(directory)
    tokenizer = make_tiny_tokenizer(pad_is_eos, add_bos)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            tiny_config(family, tokenizer), dtype=torch.float32
        )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
