"""Families that the native decoder knows. Adding one means adding a table here."""

from __future__ import annotations

from typing import Any

from ..spec import DecoderSpec, UnsupportedFamily
from .base import HEAD, SCORE, Entry, Family
from .gpt2 import GPT2
from .llama import LLAMA
from .opt import OPT

__all__ = ["HEAD", "SCORE", "Entry", "Family", "family_of_spec", "family_of_type", "spec_from_hf"]

_FAMILIES = (LLAMA, OPT, GPT2)
_BY_MODEL_TYPE = {kind: family for family in _FAMILIES for kind in family.architectures}


def family_of_type(model_type: str) -> Family:
    """The table of a transformers ``model_type``; raises ``UnsupportedFamily`` without one."""
    family = _BY_MODEL_TYPE.get(model_type)
    if family is None:
        known = ", ".join(sorted(_BY_MODEL_TYPE))
        raise UnsupportedFamily(f"model type {model_type!r} (native: {known})")
    return family


def family_of_spec(spec: DecoderSpec) -> Family:
    """The table that a spec was read with."""
    return next(family for family in _FAMILIES if family.name == spec.family)


def spec_from_hf(hf_config: Any) -> DecoderSpec:
    """Describe a Hugging Face config, or raise ``UnsupportedFamily`` with the reason."""
    family = family_of_type(hf_config.model_type)
    if getattr(hf_config, "quantization_config", None):
        raise UnsupportedFamily("quantized weights")
    return family.spec_from_config(hf_config)
