"""Models on the device that this rank computes on."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from hybrid_engine.distributed.device import compute_device
from hybrid_engine.errors import UserError

from .foreign import ForeignModel

Placed = TypeVar("Placed", bound=nn.Module)


def placed(model: Placed) -> Placed:
    """The model, moved to this rank's device.

    Raises:
        UserError: it has no decoder of ours, and the device is a GPU.
    """
    device = compute_device()
    if device.type != "cpu" and isinstance(model, ForeignModel):
        raise UserError(
            "families that run through transformers' own module run on the CPU alone; give "
            "--device cpu"
        )
    model.to(device)
    return model
