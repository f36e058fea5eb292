"""Weights that are not trained: their checksum, and the assertion that they keep their bits."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from hybrid_engine.engine.train_state import local_parts


def frozen_checksum(module: nn.Module) -> int:
    """CRC-32 over names and bytes of the whole parameters that checkpoints leave out."""
    checksum = 0
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            checksum = _crc(parameter, zlib.crc32(name.encode(), checksum))
    return checksum


class FrozenWeights:
    """Remembers the bits of what this rank holds of the frozen weights.

    Under ZeRO-3 that is its shards, and whatever is gathered at the moment. A check reads them once
    and sends nothing.

    Args:
        module: after DeepSpeed has placed its parameters.
        name: for messages.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module = module
        self._name = name
        self._known: dict[tuple[str, int, int], int] = {}  # (name, start, elements) -> CRC-32
        self.check("loading")

    def check(self, phase: str) -> None:
        """Compares all of them with what was first seen of each.

        Args:
            phase: what has just been done, for the message.

        Raises:
            RuntimeError: a weight has other bits than before; it is named.
        """
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad:
                continue
            for start, values, _ in local_parts(parameter):
                checksum = _crc(values)
                if self._known.setdefault((name, start, values.numel()), checksum) != checksum:
                    raise RuntimeError(
                        f"{self._name}: the frozen weight {name} has changed while {phase}; what "
                        "is trained now has another base than its checkpoints record. Resume from "
                        "the last checkpoint"
                    )


def _crc(values: Tensor, start: int = 0) -> int:
    raw = values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return zlib.crc32(raw, start)
