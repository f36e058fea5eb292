"""Random tiny transformers models of every layout, compared with ours on ragged batches."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from hybrid_engine.models import pack, unpack

VOCAB, CONTEXT, PAD, EOS = 101, 64, 1, 2
LENGTHS = (9, 1, 17, 2)


@dataclass(frozen=True)
class Layout:
    """A config class with the values that make it odd."""

    config_class: type[PretrainedConfig]
    values: dict[str, Any] = field(default_factory=dict)

    def config(self) -> PretrainedConfig:
        special = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 3}
        return self.config_class(**{**special, **_SIZES[self.config_class], **self.values})


_MODERN = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_OPT = {
    "hidden_size": 48,
    "ffn_dim": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": CONTEXT,
}
_GPT2 = {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": CONTEXT}
_SIZES: dict[type[PretrainedConfig], dict[str, Any]] = {
    LlamaConfig: _MODERN,
    MistralConfig: {**_MODERN, "sliding_window": None},
    Qwen2Config: _MODERN,
    Qwen3Config: {**_MODERN, "head_dim": 16},
    OPTConfig: _OPT,
    GPT2Config: _GPT2,
}


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **values}}


_LLAMA3 = _rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=16)
# No size divides by four, OPT's and GPT-2's not by two either.
_UNEVEN_LLAMA = {"hidden_size": 54, "num_attention_heads": 9, "num_key_value_heads": 3}
_UNEVEN_OPT = {
    "hidden_size": 45,
    "word_embed_proj_dim": 45,
    "ffn_dim": 71,
    "num_attention_heads": 9,
}
_DEEP = {"num_hidden_layers": 8, "hidden_size": 192, "intermediate_size": 512}
_350M = {"do_layer_norm_before": False, "word_embed_proj_dim": 32}

LAYOUTS: dict[str, Layout] = {
    "llama": Layout(LlamaConfig),
    "llama-tied": Layout(LlamaConfig, {"tie_word_embeddings": True}),
    "llama-uneven": Layout(LlamaConfig, {**_UNEVEN_LLAMA, "tie_word_embeddings": True}),
    "llama-deep": Layout(LlamaConfig, _DEEP),
    "llama-biases": Layout(LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-mha-head-dim": Layout(LlamaConfig, {"num_key_value_heads": 6, "head_dim": 12}),
    "llama-gelu": Layout(LlamaConfig, {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-rope-linear": Layout(LlamaConfig, _rope("linear", factor=4.0)),
    "llama-rope-llama3": Layout(LlamaConfig, _LLAMA3),
    "llama-rope-yarn": Layout(LlamaConfig, _YARN),
    "mistral": Layout(MistralConfig),
    "mistral-window": Layout(MistralConfig, {"sliding_window": 5}),
    "qwen2": Layout(Qwen2Config),
    "qwen2-window": Layout(
        Qwen2Config, {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}
    ),
    "qwen3": Layout(Qwen3Config),
    "qwen3-tied": Layout(Qwen3Config, {"tie_word_embeddings": True, "attention_bias": True}),
    "opt": Layout(OPTConfig),
    "opt-350m": Layout(OPTConfig, _350M),
    "opt-no-final-norm": Layout(OPTConfig, {"_remove_final_layer_norm": True}),
    "opt-no-bias-gelu": Layout(OPTConfig, {"enable_bias": False, "activation_function": "gelu"}),
    "opt-untied": Layout(OPTConfig, {"tie_word_embeddings": False}),
    "opt-uneven": Layout(OPTConfig, _UNEVEN_OPT),
    "gpt2": Layout(GPT2Config),
    "gpt2-uneven": Layout(GPT2Config, {"n_embd": 45, "n_head": 9, "n_inner": 71}),
    "gpt2-inner-unscaled": Layout(
        GPT2Config, {"n_inner": 56, "scale_attn_weights": False, "activation_function": "gelu"}
    ),
}
ONE_OF_EACH_FAMILY = ("llama-tied", "qwen3", "opt-350m", "gpt2")


def save_causal(layout: str, directory: Path, seed: int = 0) -> torch.nn.Module:
    """A random transformers model of a layout, saved; every tensor of it matters to the logits."""
    return _save(AutoModelForCausalLM, layout, directory, seed)


def save_classifier(layout: str, directory: Path, seed: int = 0) -> torch.nn.Module:
    """The same with a one-label head."""
    return _save(AutoModelForSequenceClassification, layout, directory, seed)


def _save(auto_class: Any, layout: str, directory: Path, seed: int) -> torch.nn.Module:
    config = LAYOUTS[layout].config()
    if auto_class is AutoModelForSequenceClassification:
        config.num_labels = 1
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = auto_class.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():  # biases and norms start as zeros and ones
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory)
    return model.eval()


def ragged(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """Random tokens, none of them the padding token."""
    draw = random.Random(seed)
    return [[draw.randrange(4, VOCAB) for _ in range(length)] for length in lengths]


def grouped(seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Three answers to each of two prompts, one of them empty, and a sequence of its own; with the
    lengths of the prompts.
    """
    long, short, other = ragged(seed, (30, 5, 9))
    answers = ragged(seed + 1, (4, 29, 34, 0, 3, 2))
    heads = [long, short, long, short, long, short]
    sequences = [head + answer for head, answer in zip(heads, answers, strict=True)]
    return [*sequences, other], [len(head) for head in heads] + [2]


def padded(sequences: list[list[int]], side: str) -> dict[str, Tensor]:
    """What transformers takes: ids, mask and positions ``[B, L]``, padded on one side."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), PAD)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, tokens in enumerate(sequences):
        place = slice(0, len(tokens)) if side == "right" else slice(width - len(tokens), width)
        ids[row, place] = torch.tensor(tokens)
        mask[row, place] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def peer_logits(peer: torch.nn.Module, sequences: list[list[int]], side: str) -> list[Tensor]:
    """transformers' logits of a padded batch, the real tokens of each sequence."""
    inputs = padded(sequences, side)
    logits = peer(**inputs).logits
    return [row[mask.bool()] for row, mask in zip(logits, inputs["attention_mask"], strict=True)]


@torch.no_grad()
def worst_logit_gap(
    model: Any, peer: torch.nn.Module, sequences: list[list[int]], side: str
) -> float:
    """Largest absolute difference of any logit of any real token."""
    batch = pack(sequences)
    ours, theirs = unpack(model.logits(batch), batch), peer_logits(peer, sequences, side)
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
