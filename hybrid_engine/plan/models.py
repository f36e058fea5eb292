"""The parameters of a model, counted without loading one: its module is made on torch's meta
device, which has shapes and no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from hybrid_engine.models import (
    CausalLM,
    DecoderSpec,
    LoRAConfig,
    ScalarModel,
    adapted_linears,
    apply_lora,
    train_top_layers,
)


class Parameter(NamedTuple):
    """One parameter; tied ones are there once. ``origin`` says which training wrote it last:
    parameters of one name and one origin are equal.
    """

    name: str
    numel: int
    trained: bool
    origin: str


@dataclass(frozen=True)
class ModelSize:
    """What a model is made of, and what of it is trained."""

    spec: DecoderSpec
    itemsize: int
    parameters: tuple[Parameter, ...]
    lora_columns: int = 0  # widest low-rank intermediate

    @property
    def nbytes(self) -> int:
        return sum(p.numel for p in self.parameters) * self.itemsize

    @property
    def trained(self) -> int:
        """Elements that are trained."""
        return sum(p.numel for p in self.parameters if p.trained)

    @property
    def trained_blocks(self) -> int:
        """Blocks from the first trained one on; everything if the embedding is trained."""
        first = [_block(p.name) for p in self.parameters if p.trained]
        if any(p.trained and p.name.startswith("decoder.embed") for p in self.parameters):
            return self.spec.num_layers
        inside = [block for block in first if block is not None]
        return self.spec.num_layers - min(inside, default=self.spec.num_layers)

    @property
    def embedding(self) -> int:
        """Elements of the token embedding if it is trained, else 0."""
        return self._trained("decoder.embed_tokens.weight")

    @property
    def head(self) -> int:
        """Elements of the matrix that the language-model head multiplies with, if trained."""
        return self.embedding if self.spec.tied_head else self._trained("head.weight")

    def of_origin(self, origin: str) -> ModelSize:
        """The same, after a training named `origin`."""
        written = [p._replace(origin=origin) if p.trained else p for p in self.parameters]
        return ModelSize(self.spec, self.itemsize, tuple(written), self.lora_columns)

    def origins(self) -> dict[str, str]:
        return {p.name: p.origin for p in self.parameters}

    def _trained(self, name: str) -> int:
        return sum(p.numel for p in self.parameters if p.name == name and p.trained)


@cache
def _table(
    spec: DecoderSpec, scalar: bool, lora: LoRAConfig | None, layers: int
) -> tuple[tuple[tuple[str, int, bool], ...], int]:
    with torch.device("meta"):
        model = ScalarModel(spec) if scalar else CausalLM(spec)
    if lora is not None:
        apply_lora(model, lora)
    elif layers:
        train_top_layers(model, layers)
    columns = max((linear.lora_a.shape[0] for _, linear in adapted_linears(model)), default=0)
    rows = ((name, p.numel(), p.requires_grad) for name, p in model.named_parameters())
    return tuple(rows), columns


def model_size(
    spec: DecoderSpec,
    dtype: str,
    origins: dict[str, str] | str,
    *,
    scalar: bool = False,
    lora: LoRAConfig | None = None,
    trainable_layers: int = 0,
    frozen: bool = False,
) -> ModelSize:
    """A language or scalar model as `Run` loads it.

    Args:
        origins: of every parameter by name, or one for all; a name that is not there is new.
        frozen: nothing of it is trained.
    """
    table, columns = _table(spec, scalar, lora, trainable_layers)
    known = (
        (lambda name: origins)
        if isinstance(origins, str)
        else (lambda name: origins.get(name, "new"))
    )
    parameters = tuple(
        Parameter(name, numel, trained and not frozen, known(name))
        for name, numel, trained in table
    )
    return ModelSize(spec, getattr(torch, dtype).itemsize, parameters, columns)


def own_bytes(models: Sequence[ModelSize], sharing: bool) -> list[int]:
    """Bytes of each model that no earlier one has: `share_frozen_trunk` leaves one copy of frozen
    parameters that are equal in the first model.
    """
    if not models:
        return []
    first = {p.name: p for p in models[0].parameters}
    sizes = [models[0].nbytes]
    for model in models[1:]:
        shared = sum(p.numel for p in model.parameters if sharing and _shares(first.get(p.name), p))
        sizes.append(model.nbytes - shared * model.itemsize)
    return sizes


def shared_blocks(models: Sequence[ModelSize]) -> int:
    """Leading blocks, with the embedding before them, that are frozen and equal in all models."""
    if len(models) < 2:
        return 0
    first = {p.name: p for p in models[0].parameters}
    limit = min(model.spec.num_layers - model.trained_blocks for model in models)
    for model in models[1:]:
        for p in model.parameters:
            block = _block(p.name)
            before = p.name.startswith(("decoder.embed", "decoder.project_in"))
            if _shares(first.get(p.name), p) or not (before or block is not None):
                continue
            if before:
                return 0
            limit = min(limit, block if block is not None else limit)
    return limit


def _shares(mine: Parameter | None, other: Parameter) -> bool:
    if mine is None or mine.trained or other.trained:
        return False
    return mine.origin == other.origin != "new" and mine.numel == other.numel


def _block(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["decoder", "blocks"] else None
