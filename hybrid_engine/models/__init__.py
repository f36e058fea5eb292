"""Models: a declarative decoder, its heads, and Hugging Face directories in and out."""

from .checkpoint_io import load_causal_lm, load_scalar_model, train_top_layers
from .decoder import Block, Decoder
from .families import spec_from_hf
from .foreign import ForeignCausalLM, ForeignScalarModel
from .heads import CausalLM, ScalarModel, TokenScores
from .lora import (
    LoRAConfig,
    adapted_linears,
    adapters_disabled,
    adapters_merged,
    apply_lora,
    merged_weight,
)
from .packing import PackedBatch, last_rows, pack, response_rows, span_rows, unpack
from .placing import placed
from .quantized import is_quantized
from .resting import Resting
from .rope import rope_tables
from .saving import save_adapter, save_model
from .spec import DecoderSpec, RopeSpec, UnsupportedFamily
from .tokenizers import load_tokenizer
from .trunk import Trunk, compute_trunk, frozen_blocks, share_frozen_trunk

__all__ = [
    "Block",
    "CausalLM",
    "Decoder",
    "DecoderSpec",
    "ForeignCausalLM",
    "ForeignScalarModel",
    "LoRAConfig",
    "PackedBatch",
    "Resting",
    "RopeSpec",
    "ScalarModel",
    "TokenScores",
    "Trunk",
    "UnsupportedFamily",
    "adapted_linears",
    "adapters_disabled",
    "adapters_merged",
    "apply_lora",
    "compute_trunk",
    "frozen_blocks",
    "is_quantized",
    "last_rows",
    "load_causal_lm",
    "load_scalar_model",
    "load_tokenizer",
    "merged_weight",
    "pack",
    "placed",
    "response_rows",
    "rope_tables",
    "save_adapter",
    "save_model",
    "share_frozen_trunk",
    "span_rows",
    "spec_from_hf",
    "train_top_layers",
    "unpack",
]
