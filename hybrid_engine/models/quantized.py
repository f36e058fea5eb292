"""A frozen base in 4 or 8 bits a weight, under adapters that are trained in full precision.

QLoRA: Dettmers et al. 2023, arXiv:2305.14314. bitsandbytes quantizes and dequantizes. A layer's
weight is computed from its codes wherever it is read, by torch's parametrization, and is never
kept: for a forward pass, again for the backward pass, and once for a phase of generation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hybrid_engine.errors import UserError
from hybrid_kernels.nn import Linear

from .heads import NativeModel

BITS = (4, 8)
# Weights that share a scale: bitsandbytes' (and transformers') own for 4 bits.
_BLOCK = {4: 64, 8: 256}
_CODES = ".parametrizations.weight.original"


class Dequantize(nn.Module):
    """From a weight's codes to the weight, in the dtype that it had.

    Args:
        shape: of the weight.
        state: bitsandbytes' `QuantState`: the scale of every block, in float32.
        function: its function from codes and state to values.
    """

    def __init__(self, shape: torch.Size, state: Any, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.shape, self.state = shape, state
        self._function = function

    @torch.no_grad()
    def forward(self, codes: Tensor) -> Tensor:
        return self._function(codes, self.state).view(self.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Dequantize:
        """Scales go where the module goes; they are no buffers, so that no cast rounds them."""
        self.state.to(fn(self.state.absmax.new_empty(0)).device)
        return super()._apply(fn, recurse)


@torch.no_grad()
def quantize_base(model: NativeModel, bits: int) -> None:
    """Keep the weights of the blocks' linear layers, which must be frozen, in ``bits`` bits.

    4 is NormalFloat in blocks of 64 (4.5 bits with the scales), 8 the 8-bit dynamic type in blocks
    of 256 (8.1). Embeddings, norms, biases, heads and adapters stay as they are.

    Raises:
        UserError: another number of bits, or no bitsandbytes.
        ValueError: a weight that is trained.
    """
    if bits not in BITS:
        raise UserError(f"a base in {bits} bits: give 4 or 8")
    quantize, dequantize = _functions(bits)
    for module in model.decoder.blocks.modules():
        if isinstance(module, Linear):
            if module.weight.requires_grad:
                raise ValueError("only a frozen base can be quantized; add adapters first")
            # Flat: where blocks run over the ends of rows, bitsandbytes 0.50 errs with AVX-512.
            shape = module.weight.shape
            codes, state = quantize(module.weight.detach().flatten())
            module.weight = nn.Parameter(codes, requires_grad=False)
            parametrize.register_parametrization(
                module, "weight", Dequantize(shape, state, dequantize), unsafe=True
            )


def is_quantized(model: nn.Module) -> bool:
    """Whether :func:`quantize_base` has been at work."""
    return any(isinstance(module, Dequantize) for module in model.modules())


def weight_name(name: str) -> str | None:
    """Of a parameter of codes, the name of the weight that they stand for; None for others."""
    return name.removesuffix(_CODES) + ".weight" if name.endswith(_CODES) else None


def _functions(bits: int) -> tuple[Callable[..., Any], Callable[..., Tensor]]:
    # Of products on a CPU that it could do faster with another package; ours are not its own.
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise UserError(
            f"a base in {bits} bits needs bitsandbytes ({error}): pip install bitsandbytes, or "
            "leave --lora-base-bits out"
        ) from error
    block = _BLOCK[bits]
    if bits == 4:
        return (
            lambda weight: functional.quantize_4bit(weight, blocksize=block, quant_type="nf4"),
            functional.dequantize_4bit,
        )
    return (
        lambda weight: functional.quantize_blockwise(weight, blocksize=block),
        functional.dequantize_blockwise,
    )
