"""Low-rank adapters on the decoder's linear layers (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hybrid_kernels import ops
from hybrid_kernels.nn import Linear

from .heads import NativeModel

TARGETS = ("qkv", "attn_out", "mlp_in", "mlp_out")


@dataclass(frozen=True)
class LoRAConfig:
    """y = W x + (alpha / r) B A x, with one (A, B) pair for each of q, k, v, gate and up."""

    r: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if self.r <= 0:
            raise ValueError(f"LoRA rank must be positive, got {self.r}")
        unknown = set(self.targets) - set(TARGETS)
        if unknown or not self.targets:
            raise ValueError(f"LoRA targets are {', '.join(TARGETS)}; got {list(self.targets)}")


def apply_lora(model: NativeModel, config: LoRAConfig, seed: int = 0) -> None:
    """Freeze the decoder and the language-model head; add trainable adapters that start as zero.

    A is uniform as in Kaiming's rule for linear layers, B is zero, so the first forward equals the
    base model's. The same seed gives the same A on every rank. A scalar model's ``score`` stays
    trainable.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("score."))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in model.decoder.blocks:
            for target in config.targets:
                getattr(block, target).add_lora(config.r, config.alpha)


def adapted_linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Names and modules of the linear layers that carry an adapter."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.lora_a is not None:
            yield name, module


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """The base model, for as long as this lasts: a LoRA policy is its own reference."""
    linears = [linear for _, linear in adapted_linears(model)]
    for linear in linears:
        linear.lora_enabled = False
    try:
        yield
    finally:
        for linear in linears:
            linear.lora_enabled = True


@torch.no_grad()
def merged_weight(linear: Linear) -> Tensor:
    """W + (alpha / r) B A in fresh storage; the layer itself is left as it is."""
    if linear.lora_a is None:
        return linear.weight.detach()
    return ops.lora_merge(
        linear.weight, linear.lora_a, linear.lora_b, linear.lora_scale, linear.splits
    )
