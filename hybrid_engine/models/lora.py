"""Low-rank adapters on the decoder's linear layers (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hybrid_engine.errors import UserError
from hybrid_kernels import ops
from hybrid_kernels.nn import Linear

from .heads import NativeModel
from .lora_places import ALL_LINEAR, Place, adaptable, select


@dataclass(frozen=True)
class LoRAConfig:
    """y = W x + scale B A dropout(x), with PEFT's names.

    Attributes:
        r: rank.
        alpha: scale is alpha / r.
        dropout: of the low-rank term's input, in training mode alone.
        target_modules: layers by transformers' names (q_proj, c_attn, ...), regular expressions of
            whole names, or "all-linear".
        use_rslora: scale is alpha / sqrt(r) instead (Kalajdzievski 2023, arXiv:2312.03732).
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.r <= 0:
            raise UserError(f"LoRA rank is {self.r}; give 1 or more")
        if not 0 <= self.dropout < 1:
            raise UserError(f"LoRA dropout is {self.dropout}; give a number in [0, 1)")
        if not self.target_modules:
            raise UserError(f"no LoRA target modules; give {ALL_LINEAR}, or names of layers")

    @property
    def scale(self) -> float:
        """The factor of the low-rank term."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class Adapter(NamedTuple):
    """What a model's low-rank factors are: its settings, and the layers that have some."""

    config: LoRAConfig
    places: tuple[Place, ...]


def apply_lora(model: NativeModel, config: LoRAConfig, seed: int = 0) -> None:
    """Freeze the decoder and the language-model head; add trainable adapters that start as zero.

    A is uniform as in Kaiming's rule for linear layers, B is zero, so the first forward equals the
    base model's. The same seed gives the same A on every rank. A scalar model's ``score`` stays
    trainable.

    Raises:
        UserError: a target module that the model does not have.
    """
    attach(model, config, select(adaptable(model.spec), config.target_modules), seed)


@torch.no_grad()
def attach(model: NativeModel, config: LoRAConfig, places: Sequence[Place], seed: int = 0) -> None:
    """:func:`apply_lora` to given places.

    A part of a fused layer that none of them names gets zeros for both factors. Their gradients are
    zero then, each being a product with the other, so that no step of an optimizer moves them.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("score."))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for linear, group in by_linear(model, places):
            linear.add_lora(
                config.r, config.scale, config.dropout, group[0].outputs or (linear.out_features,)
            )
            named = {place.part for place in group}
            for part in range(len(linear.lora_splits)):
                if part not in named:
                    factors(linear, part)[0].zero_()
    model.adapter = Adapter(config, tuple(places))


def by_linear(model: nn.Module, places: Iterable[Place]) -> Iterator[tuple[Linear, list[Place]]]:
    """Our linear layers in turn, each with those of the places that it holds."""
    for name, group in groupby(places, key=lambda place: place.linear):
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear)
        yield linear, list(group)


def factors(linear: Linear, part: int) -> tuple[Tensor, Tensor]:
    """A ``[r, K]`` and B ``[outputs, r]`` of one part of a layer: views of its parameters."""
    a = linear.lora_a.detach().chunk(len(linear.lora_splits))[part]
    return a, linear.lora_b.detach().split(linear.lora_splits)[part]


def adapted_linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Names and modules of the linear layers that carry an adapter."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.lora_a is not None:
            yield name, module


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """The base model, for as long as this lasts: a LoRA policy is its own reference."""
    linears = [linear for _, linear in adapted_linears(model) if linear.lora_enabled]
    for linear in linears:
        linear.lora_enabled = False
    try:
        yield
    finally:
        for linear in linears:
            linear.lora_enabled = True


@torch.no_grad()
def merged_weight(linear: Linear) -> Tensor:
    """W + scale B A in fresh storage; the layer itself is left as it is."""
    if linear.lora_a is None:
        return linear.weight.detach()
    return ops.lora_merge(linear.weight, *_low_rank(linear))


@contextmanager
def adapters_merged(model: nn.Module) -> Iterator[None]:
    """Adapters added into the weights' own storage, for as long as this lasts.

    Afterwards every weight has the bits that it had before: what rounding took is kept meanwhile,
    a byte a weight. Weights and factors must not change inside.

    Raises:
        UserError: a quantized base.
    """
    merged = [linear for _, linear in adapted_linears(model) if linear.lora_enabled]
    if any(parametrize.is_parametrized(linear, "weight") for linear in merged):
        raise UserError("adapters cannot be merged into a quantized base; generate unmerged")
    records = []
    with adapters_disabled(model):
        try:
            for linear in merged:
                records.append(ops.lora_merge_(linear.weight, *_low_rank(linear)))
            yield
        finally:
            for linear, record in zip(merged, records, strict=False):
                ops.lora_unmerge_(linear.weight, *_low_rank(linear), record)


def _low_rank(linear: Linear) -> tuple[Tensor, Tensor, float, tuple[int, ...]]:
    return linear.lora_a, linear.lora_b, linear.lora_scale, linear.lora_splits
