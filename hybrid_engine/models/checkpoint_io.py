"""Loading: Hugging Face directories into our modules, one copy of every weight in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hybrid_engine.errors import UserError

from . import foreign
from .checkpoint_files import (
    CONFIG,
    ShardReader,
    Source,
    has_score_head,
    locate,
    open_shard,
    read_json,
    weight_files,
)
from .families import HEAD, SCORE, Family, family_of_type, spec_from_hf
from .heads import CausalLM, NativeModel, ScalarModel
from .lora import LoRAConfig, apply_lora
from .spec import UnsupportedFamily


def load_causal_lm(
    path: str | Path,
    dtype: str | torch.dtype = torch.float32,
    lora: LoRAConfig | None = None,
    trainable_layers: int = 0,
    seed: int = 0,
) -> CausalLM | foreign.ForeignCausalLM:
    """Load a language model from a Hugging Face directory or hub name.

    ``trainable_layers = k > 0`` freezes all but the last k blocks and the final norm; ``lora``
    freezes all but the adapters it adds, whose A matrices are drawn from ``seed``. A family without
    a table runs through transformers, with a warning. Raises UserError for anything wrong with the
    path or the files.
    """
    directory = locate(path)
    config = read_config(directory)
    try:
        spec = spec_from_hf(config)
    except UnsupportedFamily as reason:
        _native_only(reason, lora, trainable_layers)
        return foreign.load_causal_lm(directory, as_dtype(dtype), str(reason))
    with torch.device("meta"):
        model = CausalLM(spec)
    _materialise(model, as_dtype(dtype))
    model.tie_head()
    _Loader(model, family_of_type(config.model_type), directory).run()
    model.source = Source.read(directory)
    _choose_trainable(model, lora, trainable_layers, seed)
    return model


def load_scalar_model(
    path: str | Path,
    dtype: str | torch.dtype = torch.float32,
    lora: LoRAConfig | None = None,
    trainable_layers: int = 0,
    seed: int = 0,
) -> ScalarModel | foreign.ForeignScalarModel:
    """Load a reward or value model.

    A classification directory with one label gives its own ``score``. A causal one gets a fresh
    head, normal with variance 1 / (h + 1) (Stiennon et al. 2020, arXiv:2009.01325); ``seed`` draws
    it, and the A matrices of adapters.
    """
    directory = locate(path)
    config = read_config(directory)
    try:
        spec = spec_from_hf(config)
    except UnsupportedFamily as reason:
        _native_only(reason, lora, trainable_layers)
        return foreign.load_scalar_model(directory, as_dtype(dtype), str(reason), seed)
    with torch.device("meta"):
        model = ScalarModel(spec)
    _materialise(model, as_dtype(dtype))
    init_score(model.score.weight, seed)
    _Loader(model, family_of_type(config.model_type), directory).run()
    model.source = Source.read(directory)
    _choose_trainable(model, lora, trainable_layers, seed)
    return model


def read_config(directory: Path) -> Any:
    """The transformers config object of a directory; code in the directory is never run."""
    from transformers import AutoConfig

    read_json(directory / CONFIG)  # damaged JSON is reported with its path
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers' validators raise many types
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{directory / CONFIG}: transformers refuses it ({reason})") from error


def context_of(path: str | Path) -> float:
    """Longest sequence of the model at a directory or hub name; infinite where it states none."""
    config = read_config(locate(path)).get_text_config()
    return getattr(config, "max_position_embeddings", None) or math.inf


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """``"float32"``, ``"bfloat16"`` or ``"float16"`` as a torch dtype."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype {dtype!r}: give float32, bfloat16 or float16")
    return getattr(torch, dtype)


@torch.no_grad()
def init_score(weight: Tensor, seed: int) -> None:
    """Fill a fresh scalar head ``[1, h]`` in place."""
    generator = torch.Generator().manual_seed(seed)
    std = 1.0 / math.sqrt(weight.shape[1] + 1)
    weight.copy_(torch.randn(weight.shape, generator=generator) * std)


def _materialise(model: nn.Module, dtype: torch.dtype) -> None:
    model.to(dtype)
    model.to_empty(device="cpu")


def _native_only(reason: UnsupportedFamily, lora: LoRAConfig | None, trainable_layers: int) -> None:
    if lora is not None or trainable_layers:
        raise UserError(
            f"LoRA and trainable_layers need a family with a native decoder, and this one has "
            f"none: {reason}; train all weights or choose another model"
        ) from reason


def _choose_trainable(
    model: NativeModel, lora: LoRAConfig | None, trainable_layers: int, seed: int
) -> None:
    if lora is not None and trainable_layers:
        raise UserError("lora and trainable_layers are both set; choose one")
    if lora is not None:
        apply_lora(model, lora, seed)
    elif trainable_layers:
        train_top_layers(model, trainable_layers)


def train_top_layers(model: NativeModel, count: int) -> None:
    """Freeze everything but the last ``count`` blocks, the final norm and ``score``."""
    decoder = model.decoder
    if not 0 < count <= len(decoder.blocks):
        raise UserError(f"trainable_layers is {count}; the model has {len(decoder.blocks)} layers")
    model.requires_grad_(False)
    trained = [*decoder.blocks[-count:], getattr(decoder, "final_norm", None)]
    for module in [*trained, getattr(model, "score", None)]:
        if module is not None:
            module.requires_grad_(True)


class _Slot(NamedTuple):
    """Where a checkpoint tensor goes: rows of one of our parameters."""

    rows: Tensor
    transposed: bool


class _Loader:
    """Copies a checkpoint into a model, shard by shard, and checks that nothing is left over."""

    def __init__(self, model: NativeModel, family: Family, directory: Path) -> None:
        self.model, self.family, self.directory = model, family, directory
        self.slots = dict(self._slots())
        self.loaded: set[str] = set()
        self.unexpected: list[str] = []
        self.tied_copy: Tensor | None = None

    @torch.no_grad()
    def run(self) -> None:
        files = weight_files(self.directory)
        if not files:
            raise UserError(f"{self.directory}: no model.safetensors (or pytorch_model.bin)")
        for path in files:
            with open_shard(path) as shard:
                for name in shard.names:
                    self._take(shard, name)
        self._resolve_tied_head()
        self._check_complete()

    def _slots(self) -> Iterator[tuple[str, _Slot]]:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for entry in self.family.entries(self.model.spec):
            parameter = parameters[f"decoder.{entry.name}"].detach()
            parts = parameter.split(entry.rows) if entry.rows else (parameter,)
            for source, rows in zip(entry.sources, parts, strict=True):
                yield source, _Slot(rows, entry.transposed and rows.dim() == 2)
        if isinstance(self.model, ScalarModel):
            yield SCORE, _Slot(self.model.score.weight.detach(), False)
        elif isinstance(self.model, CausalLM) and not self.model.spec.tied_head:
            yield HEAD, _Slot(self.model.head.weight.detach(), False)

    def _take(self, shard: ShardReader, full_name: str) -> None:
        name = full_name.removeprefix(self.family.prefix)
        if self.family.ignored.search(name):
            return
        slot = self.slots.get(name)
        if slot is not None:
            self._copy(shard, full_name, slot)
            self.loaded.add(name)
        elif name != HEAD:
            self.unexpected.append(f"{full_name} ({shard.path.name})")
        elif isinstance(self.model, CausalLM):
            self.tied_copy = shard.tensor(full_name)

    def _copy(self, shard: ShardReader, name: str, slot: _Slot) -> None:
        tensor = shard.tensor(name)
        tensor = tensor.T if slot.transposed and tensor.dim() == 2 else tensor
        if tensor.shape != slot.rows.shape:
            expected = slot.rows.T.shape if slot.transposed else slot.rows.shape
            found = tensor.T.shape if slot.transposed else tensor.shape
            raise UserError(
                f"{shard.path}: {name} has shape {list(found)}; {CONFIG} implies {list(expected)}"
            )
        slot.rows.copy_(tensor)

    def _resolve_tied_head(self) -> None:
        """A checkpoint of a tied model may keep the one matrix under either name, or both."""
        if self.tied_copy is None:
            return
        embedding = self.family.entries(self.model.spec)[0].sources[0]
        rows = self.slots[embedding].rows
        if embedding not in self.loaded:
            rows.copy_(self.tied_copy)
            self.loaded.add(embedding)
        elif not torch.equal(rows, self.tied_copy.to(rows.dtype)):
            raise UserError(
                f"{self.directory / CONFIG}: tie_word_embeddings is true, but {HEAD} differs from "
                "the embedding; set it to false to use both"
            )

    def _check_complete(self) -> None:
        missing = [name for name in self.slots if name not in self.loaded]
        if SCORE in missing and not has_score_head(self.directory):
            missing.remove(SCORE)  # a causal model: the fresh head stays
        if missing:
            raise UserError(
                f"{self.directory}: the weight files lack {_listed(missing)}, "
                f"which {CONFIG} implies"
            )
        if self.unexpected:
            raise UserError(
                f"{self.directory}: the weight files hold {_listed(self.unexpected)}, "
                f"for which {CONFIG} implies no place; is it another kind of model?"
            )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
