"""Parameters that ZeRO-3 keeps in parts, made whole for a while."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from torch import nn


def partitioned(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those that nobody has gathered."""
    return [p for p in parameters if hasattr(p, "ds_status") and p.ds_status.name != "AVAILABLE"]


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """The parameters whole, on every rank; every rank must call this."""
    parts = partitioned(parameters)
    if not parts:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parts)
