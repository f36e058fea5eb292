"""Copying a checkpoint's tensors into a model: by name, one file at a time, nothing left over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_engine.errors import UserError

from .checkpoint_files import CONFIG, ShardReader, has_score_head, open_shard, weight_files
from .families import HEAD, SCORE, Family
from .fingerprint import Fingerprint
from .heads import CausalLM, NativeModel, ScalarModel


class _Slot(NamedTuple):
    """Where a checkpoint tensor goes: rows of one of our parameters."""

    rows: Tensor
    transposed: bool


class WeightLoader:
    """Copies a checkpoint into a model, shard by shard, and checks that nothing is left over."""

    def __init__(
        self,
        model: NativeModel,
        family: Family,
        directory: Path,
        fingerprint: Fingerprint | None = None,
    ) -> None:
        self.model, self.family, self.directory = model, family, directory
        self.fingerprint = fingerprint  # takes the decoder's tensors and the head, as they are read
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
            shard = open_shard(path)
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
            tensor = shard.tensor(full_name)
            self._copy(shard.path, full_name, tensor, slot)
            self._note(name, tensor)
        elif name != HEAD:
            self.unexpected.append(f"{full_name} ({shard.path.name})")
        elif isinstance(self.model, CausalLM):
            self.tied_copy = shard.tensor(full_name)
        elif self.fingerprint is not None and not self.model.spec.tied_head:
            self.fingerprint.add(name, shard.tensor(full_name))  # no use, but part of the base

    def _note(self, name: str, tensor: Tensor) -> None:
        self.loaded.add(name)
        if self.fingerprint is not None and name != SCORE:
            self.fingerprint.add(name, tensor)

    def _copy(self, path: Path, name: str, tensor: Tensor, slot: _Slot) -> None:
        tensor = tensor.T if slot.transposed and tensor.dim() == 2 else tensor
        if tensor.shape != slot.rows.shape:
            expected = slot.rows.T.shape if slot.transposed else slot.rows.shape
            found = tensor.T.shape if slot.transposed else tensor.shape
            raise UserError(
                f"{path}: {name} has shape {list(found)}; {CONFIG} implies {list(expected)}"
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
            self._note(embedding, self.tied_copy)
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
