"""The models that benchmarks run on, and the work that a token costs on them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybrid_engine.data.demo import ensure_demo_model

FLOAT = 4
TINY_VOCAB = 8192


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, fp32: the directory HYBRID_ENGINE_SMOLLM2 names, or the demo model."""
    named = os.environ.get("HYBRID_ENGINE_SMOLLM2")
    return Path(named) if named else ensure_demo_model()


def make_tiny(directory: Path) -> Path:
    """A Llama of 10 million random parameters, so small that dispatching its operators costs more
    than computing them.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TINY_VOCAB,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def make_scorer(source: Path, directory: Path) -> Path:
    """A reward model of the same size: the language model's body and a random head."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=1, dtype=torch.float32
    )
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Cost:
    """Work of a decoder-only model with a tied or untied head, from its Hugging Face config.

    Products of the linear layers and of attention count; norms, activations and sampling do not.
    """

    layers: int
    heads: int
    head_dim: int
    kv_heads: int
    block_weights: int  # of the linear layers of all blocks
    head_weights: int

    @classmethod
    def of(cls, directory: Path) -> Cost:
        from transformers import AutoConfig

        config: Any = AutoConfig.from_pretrained(directory)
        hidden, heads = config.hidden_size, config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        attention = hidden * head_dim * 2 * (heads + config.num_key_value_heads)
        mlp = 3 * hidden * config.intermediate_size
        return cls(
            layers=config.num_hidden_layers,
            heads=heads,
            head_dim=head_dim,
            kv_heads=config.num_key_value_heads,
            block_weights=config.num_hidden_layers * (attention + mlp),
            head_weights=config.vocab_size * hidden,
        )

    @property
    def weights(self) -> int:
        """What a decode step reads; of a tied embedding the head alone."""
        return self.block_weights + self.head_weights

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * FLOAT

    def forward_flops(self, lengths: list[int], scored: int) -> int:
        """One causal forward over sequences of these lengths, the head on `scored` rows."""
        attended = sum(length * (length + 1) // 2 for length in lengths)
        products = 2 * self.block_weights * sum(lengths) + 2 * self.head_weights * scored
        return products + 4 * self.layers * self.heads * self.head_dim * attended

    def generate_flops(self, prompts: list[int], responses: list[int], n: int = 1) -> int:
        """Prefill of each prompt once, n responses to each: `responses` has len(prompts) * n."""
        total = self.forward_flops(prompts, len(responses))  # the head draws a first token each
        for i, response in enumerate(responses):
            before = prompts[i // n]
            total += self.forward_flops([before + response - 1], response - 1)
            total -= self.forward_flops([before], 0)
        return total
