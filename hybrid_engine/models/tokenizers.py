"""Tokenizers of model directories: loading, copying, and the padding token of a scorer."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

from hybrid_engine.errors import UserError

from .checkpoint_files import is_adapter, locate_any
from .origin import find

_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
    "*.model",
)


def load_tokenizer(path: str | Path, base: str | Path | None = None) -> Any:
    """The tokenizer of a model directory or hub name; code in it is never run.

    An adapter without one has that of the model that it adapts, or of ``base``.
    """
    from transformers import AutoTokenizer

    directory = locate_any(path)
    if is_adapter(directory) and not tokenizer_files(directory):
        directory = find(path, base).directory
    if not tokenizer_files(directory):
        raise UserError(f"{directory}: no tokenizer files (tokenizer.json or vocab.json)")
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # every tokenizer backend raises its own types
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{directory}: its tokenizer cannot be loaded ({reason})") from error


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a directory that belong to its tokenizer and chat template."""
    return sorted({path for name in _NAMES for path in directory.glob(name) if path.is_file()})


def write_tokenizer(target: Path, source: Path, tokenizer: Any, pad_id: int | None) -> None:
    """Put a tokenizer into ``target``: the given one, or (None) the source's files as they are.

    ``pad_id`` replaces the padding token in the written copy where it differs.
    """
    if tokenizer is None:
        if not source.is_dir():
            raise UserError(f"{source}: the tokenizer was there when the model was loaded; give it")
        files = tokenizer_files(source)
        if not files:
            return
        for path in files:
            shutil.copyfile(path, target / path.name)
        if pad_id is None:
            return
        tokenizer = load_tokenizer(source)
        if tokenizer.pad_token_id == pad_id:
            return
    if pad_id is not None and tokenizer.pad_token_id != pad_id:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    tokenizer.save_pretrained(target)


def scoring_pad_token(config: dict[str, Any], source: Path, tokenizer: Any | None) -> int | None:
    """The padding token to write beside a scalar model, or None when nothing suggests one.

    transformers scores a row at its last token that is not the padding token. A sequence that ends
    with EOS is therefore scored at EOS, as our models do, only if padding is another token. In
    order of preference: the config's, the tokenizer's, the unknown token, a special token made for
    padding.
    """
    if tokenizer is None and tokenizer_files(source):
        tokenizer = load_tokenizer(source)
    candidates = [
        config.get("pad_token_id"),
        getattr(tokenizer, "pad_token_id", None),
        getattr(tokenizer, "unk_token_id", None),
        config.get("unk_token_id"),
        *_tokens_made_for_padding(tokenizer),
    ]
    ends = _end_tokens(config, tokenizer)
    for candidate in candidates:
        if candidate is not None and candidate not in ends:
            return candidate
    if ends:
        warnings.warn(
            "this tokenizer has no token but EOS to pad with: transformers will score a padded "
            "sequence that ends with EOS one token earlier than this package does",
            stacklevel=2,
        )
        return min(ends)
    return None


def _tokens_made_for_padding(tokenizer: Any | None) -> list[int]:
    """Such as Llama 3's <|finetune_right_pad_id|>."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return [index for index, token in added.items() if "pad" in token.content.lower()]


def _end_tokens(config: dict[str, Any], tokenizer: Any | None) -> set[int]:
    declared = config.get("eos_token_id")
    ends = set(declared) if isinstance(declared, list) else {declared}
    ends.add(getattr(tokenizer, "eos_token_id", None))
    return {end for end in ends if end is not None}
