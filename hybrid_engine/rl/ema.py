"""Exponential moving average of a policy's trainable parameters, in fp32.

    average <- decay average + (1 - decay) parameter

Works on what a rank holds (whole parameters, or its ZeRO-3 shards), so it needs no communication.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class EMA:
    """The average starts at the parameters themselves, so it needs no bias correction.

    Attributes:
        averages: name -> fp32 tensor, updated in place: what a checkpoint writes, and fills.

    Args:
        parameters: name -> live tensor, as `TrainEngine.local_parameters()` gives them. The
            tensors are asked for at every update, because ZeRO may re-point them.
        decay: in [0, 1).
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay is {decay}; expected a value in [0, 1)")
        self.decay = decay
        self.averages = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        for name, average in self.averages.items():
            average.lerp_(parameters[name].detach().to(average.dtype), 1.0 - self.decay)
