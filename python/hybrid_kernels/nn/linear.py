"""A linear layer with an optional LoRA adapter for each block of its outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hybrid_kernels import ops


class Linear(nn.Module):
    """``ops.linear`` with its parameters.

    ``weight [N, K]``, ``bias [N]``, ``lora_a [S * r, K]``, ``lora_b [N, r]``; absent ones are None.
    A fused projection (q|k|v, gate|up) keeps one (A, B) pair for each of its S parts, as separate
    layers would, unless it is adapted as one layer.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        splits: sizes of the parts of the output, summing to N; None means one.
        lora_rank: r; 0 means no adapter.
        lora_alpha: the low-rank term is scaled by ``lora_alpha / lora_rank``.

    Raises:
        ValueError: splits that do not sum to N, or a negative rank.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        splits: Sequence[int] | None = None,
        lora_rank: int = 0,
        lora_alpha: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.splits = tuple(splits) if splits is not None else (out_features,)
        if sum(self.splits) != out_features:
            raise ValueError(
                f"Linear: splits {self.splits} sum to {sum(self.splits)}; expected {out_features}"
            )
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, device=device, dtype=dtype)
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.lora_scale = 1.0
        self.lora_splits: tuple[int, ...] = self.splits  # outputs of each (A, B) pair
        self.lora_dropout = 0.0
        self.lora_enabled = True  # False: the base layer alone, adapter or not
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)
        self.reset_parameters()
        if lora_rank:
            self.add_lora(lora_rank, lora_alpha / lora_rank)

    def reset_parameters(self) -> None:
        """Weight and bias as ``torch.nn.Linear`` initialises them."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
            nn.init.uniform_(self.bias, -bound, bound)

    def add_lora(
        self,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        splits: Sequence[int] | None = None,
    ) -> None:
        """Adds an adapter that changes nothing yet: A kaiming uniform (a = sqrt 5), B zero.

        Args:
            rank: r.
            scale: the factor of the low-rank term.
            dropout: probability with which the term's input is zeroed, in training mode alone.
            splits: outputs of each (A, B) pair, summing to N; None takes the layer's own parts.

        Raises:
            ValueError: a rank below 1, splits that do not sum to N, or a dropout outside [0, 1).
        """
        if rank < 1:
            raise ValueError(f"Linear: lora_rank is {rank}; expected at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"Linear: lora dropout is {dropout}; expected a value in [0, 1)")
        self.lora_splits = self.splits if splits is None else tuple(splits)
        if sum(self.lora_splits) != self.out_features:
            raise ValueError(
                f"Linear: lora splits {self.lora_splits} sum to {sum(self.lora_splits)}; "
                f"expected {self.out_features}"
            )
        self.lora_scale, self.lora_dropout = scale, dropout
        pairs = len(self.lora_splits)
        self.lora_a = nn.Parameter(self.weight.new_empty(pairs * rank, self.in_features))
        self.lora_b = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., N]``."""
        if self.lora_a is None or not self.lora_enabled:
            return self._product(x)
        if self.training and self.lora_dropout > 0:
            return self._product(x) + self._dropped_term(x)
        return self._product(x, self.lora_a, self.lora_b, self.lora_scale, self.lora_splits)

    def _product(self, x: Tensor, *adapter: Any) -> Tensor:
        if parametrize.is_parametrized(self, "weight"):  # computed, from a quantized one
            return ops.linear_recomputed(lambda: self.weight, x, self.bias, *adapter)
        return ops.linear(x, self.weight, self.bias, *adapter)

    def _dropped_term(self, x: Tensor) -> Tensor:
        """``scale B A dropout(x)``. The parts of a fused layer see the same zeros."""
        inner = ops.linear(nn.functional.dropout(x, self.lora_dropout), self.lora_a)
        inner = inner * self.lora_scale
        pairs = zip(
            inner.chunk(len(self.lora_splits), dim=-1),
            self.lora_b.split(self.lora_splits),
            strict=True,
        )
        return torch.cat([ops.linear(part, b) for part, b in pairs], dim=-1)

    def extra_repr(self) -> str:
        rank = 0 if self.lora_b is None else self.lora_b.shape[1]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, splits={self.splits}, lora_rank={rank}, "
            f"lora_dropout={self.lora_dropout}"
        )
