"""What a family is: how to read its Hugging Face config, and what its tensors are called."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..rope import yarn_attention_factor
from ..spec import DecoderSpec, RopeSpec, UnsupportedFamily

HEAD = "lm_head.weight"
SCORE = "score.weight"

_ACTIVATIONS = {
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",  # the same polynomial, written with the factor multiplied out
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class Entry:
    """One parameter of ours and the checkpoint tensors it is made of, stacked along its rows."""

    name: str  # below "decoder."
    sources: tuple[str, ...]  # below the family's prefix
    rows: tuple[int, ...] = ()  # of each source; empty for a single source
    transposed: bool = False  # the checkpoint keeps [in, out] (GPT-2's Conv1D)


@dataclass(frozen=True)
class Family:
    """A table: model types, names, and the reading of the config."""

    name: str
    architectures: dict[str, tuple[str, str]]  # model_type -> (causal class, classification class)
    prefix: str  # of the base model's tensors; base-only checkpoints leave it out
    spec_from_config: Callable[[Any], DecoderSpec]
    entries: Callable[[DecoderSpec], list[Entry]]
    ignored: re.Pattern[str]  # buffers that old checkpoints carry


def activation(name: str) -> str:
    """Our name of a transformers activation."""
    if name not in _ACTIVATIONS:
        known = ", ".join(sorted(_ACTIVATIONS))
        raise UnsupportedFamily(f"activation {name!r} (native: {known})")
    return _ACTIVATIONS[name]


def reject(condition: bool, reason: str) -> None:
    """Raise ``UnsupportedFamily`` for a feature that the spec cannot say."""
    if condition:
        raise UnsupportedFamily(reason)


def rope_from_config(config: Any, head_dim: int) -> RopeSpec:
    """Read transformers 5's ``rope_parameters`` (older keys are standardised by the config)."""
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    reject(
        kind not in ("default", "linear", "llama3", "yarn"),
        f"rope type {kind!r}: its frequencies depend on the length of the sequence, "
        "which keys that are cached already cannot follow",
    )
    reject(parameters.get("partial_rotary_factor", 1.0) != 1.0, "partial rotary embedding")
    common = {"theta": float(parameters["rope_theta"]), "rotary_dim": head_dim, "kind": kind}
    if kind == "default":
        return RopeSpec(**common)
    if kind == "linear":
        return RopeSpec(**common, factor=float(parameters["factor"]))
    original = int(parameters["original_max_position_embeddings"])
    if kind == "llama3":
        return RopeSpec(
            **common,
            factor=float(parameters["factor"]),
            original_max_positions=original,
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
        )
    factor = parameters["factor"] or config.max_position_embeddings / original
    magnitude = parameters.get("attention_factor") or yarn_attention_factor(
        factor, parameters.get("mscale") or 0.0, parameters.get("mscale_all_dim") or 0.0
    )
    return RopeSpec(
        **common,
        factor=float(factor),
        original_max_positions=original,
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        truncate=bool(parameters.get("truncate", True)),
        attention_factor=float(magnitude),
    )


def weight_and_bias(ours: str, theirs: tuple[str, ...], bias: bool, **how: Any) -> list[Entry]:
    """Entries of a linear layer; a bias is stacked like its weight and never transposed."""
    entries = [Entry(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), **how)]
    if bias:
        rows = how.get("rows", ())
        entries.append(Entry(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs), rows))
    return entries
