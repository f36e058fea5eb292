"""Frozen models in the host's memory, which come to the device when they are asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hybrid_engine.distributed.device import compute_device


class Resting:
    """Weights of frozen models wait in the host's memory, except those that they share with a model
    that stays on the device. Nothing changes them, so the device's copy is simply forgotten.

    Args:
        models: on the device; from here on only inside :meth:`awake`.
        staying: what is trained, and what shares its frozen blocks with `models`.
    """

    def __init__(self, models: Sequence[nn.Module], staying: Sequence[nn.Module]) -> None:
        kept = {weight.data_ptr() for model in staying for weight in _weights(model)}
        hosted: dict[int, Tensor] = {}
        self._weights: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        for model in models:
            own = [w for w in _weights(model) if w.numel() and w.data_ptr() not in kept]
            for weight in own:
                if weight.data_ptr() not in hosted:
                    hosted[weight.data_ptr()] = _on_host(weight.data)
            self._weights[model] = [(weight, hosted[weight.data_ptr()]) for weight in own]
        self._sleep(*models)

    @property
    def nbytes(self) -> int:
        """In the host's memory."""
        hosted = {id(host): host for pairs in self._weights.values() for _, host in pairs}
        return sum(host.nbytes for host in hosted.values())

    @contextmanager
    def awake(self, *models: nn.Module) -> Iterator[None]:
        """Those of the models are on the device inside."""
        there: dict[int, Tensor] = {}
        try:
            for model in models:
                for weight, host in self._weights[model]:
                    if id(host) not in there:
                        there[id(host)] = host.to(compute_device(), non_blocking=True, copy=True)
                    weight.data = there[id(host)]
            yield
        finally:
            self._sleep(*models)

    def _sleep(self, *models: nn.Module) -> None:
        for model in models:
            for weight, host in self._weights[model]:
                weight.data = host


def _weights(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _on_host(values: Tensor) -> Tensor:
    """Pinned, from where a GPU takes it without another copy."""
    return torch.empty_like(values, device="cpu", pin_memory=torch.cuda.is_available()).copy_(
        values
    )
