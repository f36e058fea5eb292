"""Which tokens end a response, as a model's files declare it."""

from __future__ import annotations

import json
from typing import Any

from hybrid_engine.models import CausalLM, ForeignCausalLM


def end_token_ids(model: CausalLM | ForeignCausalLM, tokenizer: Any | None) -> tuple[int, ...]:
    """Every end token of the generation config (else of the model config) and of the tokenizer.

    Instruction-tuned models have several: Llama 3 ends a turn with one token and a text with another,
    and both end a response.
    """
    declared = _declared(model)
    own = getattr(tokenizer, "eos_token_id", None)
    return tuple(sorted({*declared, *([] if own is None else [own])}))


def _declared(model: CausalLM | ForeignCausalLM) -> list[int]:
    if not model.native:
        return _as_list(model.hf_model.generation_config.eos_token_id)
    source = getattr(model, "source", None)  # absent from a model built from a spec alone
    if source is None:
        return []
    generation = json.loads(source.generation_config) if source.generation_config else {}
    return _as_list(generation.get("eos_token_id")) or _as_list(source.config.get("eos_token_id"))


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
