"""Which tokens end a response, as a model's files declare it."""

from __future__ import annotations

import json
from typing import Any

from hybrid_engine.models import CausalLM, ForeignCausalLM
from hybrid_engine.models.checkpoint_files import locate
from hybrid_engine.models.checkpoint_io import Source


def end_token_ids(model: CausalLM | ForeignCausalLM, tokenizer: Any | None) -> tuple[int, ...]:
    """Every end token of a loaded model and its tokenizer; none declared gives an empty tuple.

    Instruction-tuned models have several: Llama 3 ends a turn with one token and a text with
    another, and both end a response. The tokenizer's own comes first.
    """
    if isinstance(model, ForeignCausalLM):
        hf_model: Any = model.hf_model
        return _ordered(tokenizer, _as_list(hf_model.generation_config.eos_token_id))
    source: Any = getattr(model, "source", None)  # absent from a model built from a spec alone
    return _ordered(tokenizer, _declared(source) if source is not None else [])


def end_tokens_of(path: str, tokenizer: Any) -> tuple[int, ...]:
    """As :func:`end_token_ids`, of a directory or hub name whose weights are not loaded."""
    return _ordered(tokenizer, _declared(Source.read(locate(path))))


def _ordered(tokenizer: Any | None, declared: list[int]) -> tuple[int, ...]:
    own = getattr(tokenizer, "eos_token_id", None)
    return tuple(dict.fromkeys([*([] if own is None else [own]), *sorted(declared)]))


def _declared(source: Source) -> list[int]:
    """Of the generation config, else of the model config."""
    generation = json.loads(source.generation_config) if source.generation_config else {}
    return _as_list(generation.get("eos_token_id")) or _as_list(source.config.get("eos_token_id"))


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
