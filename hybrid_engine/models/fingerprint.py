"""A hash of a checkpoint's weights, whatever files they are spread over."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


class Fingerprint:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, in any order."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor as the file has it."""
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy()
        digest = hashlib.sha256(raw.data).hexdigest()
        self._lines[name] = f"{name} {tensor.dtype} {list(tensor.shape)} {digest}\n"

    def hexdigest(self) -> str:
        """Of everything added so far."""
        return hashlib.sha256("".join(sorted(self._lines.values())).encode()).hexdigest()
