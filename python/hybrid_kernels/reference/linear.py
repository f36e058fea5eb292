"""The linear layer in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    lora_splits: Sequence[int] | None = None,
) -> Tensor:
    """``x W^T + b + scale * concat_s((x A_s^T) B_s^T)`` over output splits s."""
    y = torch.nn.functional.linear(x, weight, bias)
    if lora_a is None or lora_b is None:
        return y
    splits = list(lora_splits or [weight.shape[0]])
    parts = [
        x @ a.T @ b.T for a, b in zip(lora_a.chunk(len(splits)), lora_b.split(splits), strict=True)
    ]
    return y + lora_scale * torch.cat(parts, dim=-1)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a b``."""
    return a @ b
