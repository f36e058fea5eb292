"""Normalisation layers with an optional fused residual add.

``norm(x)`` is ``y``; ``norm(x, residual)`` normalises ``x + residual`` and is ``(y, that sum)``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybrid_kernels import ops


class RMSNorm(nn.Module):
    """``ops.rms_norm`` over the last dimension with parameter ``weight [N]``."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """``[..., N]`` to ``[..., N]``, or to two of them with a residual."""
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps)
        return ops.add_rms_norm(x, residual, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class LayerNorm(nn.Module):
    """``ops.layer_norm`` over the last dimension, parameters ``weight [N]`` and ``bias [N]``."""

    def __init__(self, size: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """``[..., N]`` to ``[..., N]``, or to two of them with a residual."""
        if residual is None:
            return ops.layer_norm(x, self.weight, self.bias, self.eps)
        return ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, bias={self.bias is not None}"
