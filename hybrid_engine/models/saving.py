"""Saving: our modules as Hugging Face directories that transformers reopens unchanged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid_engine.errors import UserError
from hybrid_kernels.nn import Linear

from .adapter_files import write_adapter
from .checkpoint_files import CONFIG, GENERATION_CONFIG, Source
from .families import HEAD, SCORE, family_of_type
from .foreign import ForeignModel
from .gathered import gathered, partitioned
from .heads import CausalLM, NativeModel, ScalarModel
from .lora import merged_weight
from .shard_writer import ShardWriter, write_json
from .tokenizers import scoring_pad_token, write_tokenizer

AnyModel = NativeModel | ForeignModel

_MAX_SHARD_BYTES = 5 * 10**9  # transformers' own limit


def save_model(
    model: AnyModel,
    directory: str | Path,
    tokenizer: Any | None = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
    adapter: bool = False,
) -> None:
    """Write weights, config, generation config, tokenizer and chat template.

    Adapters are merged into a copy; the model is left as it is. With ``adapter`` they are written
    unmerged as well, into the directory's ``adapter/``. Without ``tokenizer`` the files of
    the directory that the model was loaded from are copied. The directory appears whole or not at
    all: it is written beside its final place and renamed. Under ZeRO-3 every rank must call this,
    unless it has gathered all parameters already; rank 0 writes. They are gathered one module at a
    time, and no rank has the model at once, except in a family without a native decoder.
    """
    directory = Path(directory)
    with written_atomically(directory, _is_writer()) as target:
        _write_model(model, target, tokenizer, max_shard_bytes)
        if adapter and isinstance(model, NativeModel) and model.adapter is not None:
            _write_adapter(model, _below(target, "adapter"), tokenizer)


def save_adapter(
    model: AnyModel, directory: str | Path, tokenizer: Any | None = None, merged: bool = False
) -> None:
    """Write the adapter that the model was loaded with, in PEFT's format, and the tokenizer.

    ``adapter_config.json`` names the base and has a hash of its weights. With ``merged`` the
    directory's ``merged/`` is what :func:`save_model` writes. Who writes and when as there. Raises
    UserError for a model without an adapter.
    """
    directory = Path(directory)
    if not isinstance(model, NativeModel) or model.adapter is None:
        raise UserError(f"{directory}: this model has no adapter to save; load it with one")
    with written_atomically(directory, _is_writer()) as target:
        _write_adapter(model, target, tokenizer)
        if merged:
            _write_model(model, _below(target, "merged"), tokenizer, _MAX_SHARD_BYTES)


def _below(target: Path | None, name: str) -> Path | None:
    if target is None:
        return None
    (target / name).mkdir()
    return target / name


def _write_model(
    model: AnyModel, target: Path | None, tokenizer: Any | None, max_shard_bytes: int
) -> None:
    if not isinstance(model, NativeModel):
        # All at once: transformers itself names the weights, and may split or join them.
        with gathered(model.parameters()):
            if target is not None:
                model.save(target, tokenizer)
        return
    _write_weights(model, target, max_shard_bytes)
    if target is not None:
        _write_companions(model, target, tokenizer)


def _write_adapter(model: NativeModel, target: Path | None, tokenizer: Any | None) -> None:
    write_adapter(model, target)
    if target is not None:
        source = _source(model)
        write_tokenizer(target, source.directory, tokenizer, _pad_id(model, source, tokenizer))


def _is_writer() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or (
        distributed.get_rank() == 0
    )


def _replace(final: Path, partial: Path, previous: Path) -> None:
    """A directory cannot be renamed over another: the old one steps aside, and back on failure."""
    if final.exists():
        final.rename(previous)
    try:
        partial.rename(final)
    except OSError:
        if previous.exists():
            previous.rename(final)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _remove_leftovers(final: Path) -> None:
    """Of processes that were killed while they wrote; a directory has one writer at a time."""
    kinds = ["partial", "previous"] if final.exists() else ["partial"]
    for leftover in (
        path for kind in kinds for path in final.parent.glob(f".{final.name}.{kind}-*")
    ):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def written_atomically(directory: Path, writer: bool) -> Iterator[Path | None]:
    """A fresh sibling directory that takes ``directory``'s place at the end; None if not writer."""
    if not writer:
        yield None
        return
    final = directory.absolute()
    partial = final.with_name(f".{final.name}.partial-{os.getpid()}")
    previous = final.with_name(f".{final.name}.previous-{os.getpid()}")
    try:
        _remove_leftovers(final)
        partial.mkdir(parents=True)
        yield partial
        _replace(final, partial, previous)
    except OSError as error:
        raise UserError(f"{directory}: cannot write the model ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def checkpoint_tensors(model: NativeModel) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a native model as transformers has them; adapters merged.

    A tensor may be a view of a parameter and, under ZeRO-3, lives until the next one is asked for.
    """
    family = family_of_type(_source(model).config["model_type"])
    for entry in family.entries(model.spec):
        path, leaf = f"decoder.{entry.name}".rsplit(".", 1)
        owner = model.get_submodule(path)
        with gathered(owner.parameters(recurse=False)):
            if leaf == "weight" and isinstance(owner, Linear):
                tensor = merged_weight(owner)
            else:
                tensor = getattr(owner, leaf).detach()
            parts = tensor.split(entry.rows) if entry.rows else (tensor,)
            for source, part in zip(entry.sources, parts, strict=True):
                turned = entry.transposed and part.dim() == 2
                yield family.prefix + source, part.T if turned else part
    if isinstance(model, ScalarModel):
        with gathered(model.score.parameters(recurse=False)):
            yield SCORE, model.score.weight.detach()
    elif isinstance(model, CausalLM) and not model.spec.tied_head:
        with gathered(model.head.parameters(recurse=False)):
            yield HEAD, model.head.weight.detach()


def _source(model: NativeModel) -> Source:
    if model.source is None:
        raise ValueError("only a model that was loaded from a directory can be saved")
    return model.source


def checkpoint_names(model: NativeModel) -> list[str]:
    """The names of :func:`checkpoint_tensors`, known before any of them is gathered."""
    family = family_of_type(_source(model).config["model_type"])
    names = [family.prefix + n for entry in family.entries(model.spec) for n in entry.sources]
    if isinstance(model, ScalarModel):
        return [*names, SCORE]
    return names if model.spec.tied_head else [*names, HEAD]


def _write_weights(model: NativeModel, target: Path | None, max_shard_bytes: int) -> None:
    """Rank 0 writes each tensor as soon as it is whole, and forgets it: it never has the model."""
    if target is None and not partitioned(model.parameters()):
        return
    writer = ShardWriter(target, max_shard_bytes, checkpoint_names(model)) if target else None
    for name, tensor in checkpoint_tensors(model):  # every rank walks: gathering is collective
        if writer is not None:
            writer.add(name, tensor)
    if writer is not None:
        writer.close()


def _write_companions(model: NativeModel, target: Path, tokenizer: Any | None) -> None:
    source = _source(model)
    config = dict(source.config)
    causal, classifier = family_of_type(config["model_type"]).architectures[config["model_type"]]
    pad_id = _pad_id(model, source, tokenizer)
    if isinstance(model, ScalarModel):
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": pad_id}
    config["architectures"] = [classifier if isinstance(model, ScalarModel) else causal]
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    write_json(target / CONFIG, config)
    if source.generation_config is not None:
        (target / GENERATION_CONFIG).write_text(source.generation_config, encoding="utf-8")
    write_tokenizer(target, source.directory, tokenizer, pad_id)


def _pad_id(model: NativeModel, source: Source, tokenizer: Any | None) -> int | None:
    """The padding token that a scalar model's tokenizer must have; None for another model's."""
    if not isinstance(model, ScalarModel):
        return None
    return scoring_pad_token(dict(source.config), source.directory, tokenizer)
