"""What a pass drew: on the device for the next step, on its way to the host for the caller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_kernels.ops import Sample


@dataclass(frozen=True)
class Drawn:
    """One token of a response, with what `Rollout` keeps of it, in the order of TOKEN_COLUMNS."""

    sample: int
    position: int  # in the response
    stops: bool  # it is an end token
    values: tuple[float, ...]

    @property
    def token(self) -> int:
        return int(self.values[0])


class Landing:
    """A pass's draws, copied to the host behind the pass. Reading them waits for no later one.

    Args:
        places: (sample, position in its response) of every draw.
        drawn: the draws.
        stop_tokens: int64 ``[S]``: looked for on the device.
    """

    def __init__(
        self, places: Sequence[tuple[int, int]], drawn: Sample, stop_tokens: Tensor
    ) -> None:
        self._places = list(places)
        stops = (drawn.token[:, None] == stop_tokens).any(1)
        whole = torch.stack([drawn.token, stops.long()])
        self._whole, self._statistics = _to_host(whole), _to_host(torch.stack(drawn[1:]))
        self._arrived: torch.cuda.Event | None = None
        if whole.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    @property
    def here(self) -> bool:
        """Whether reading would not wait."""
        return self._arrived is None or self._arrived.query()

    def read(self) -> list[Drawn]:
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens, stops = self._whole.tolist()
        values = zip(tokens, *self._statistics.tolist(), strict=True)
        return [
            Drawn(sample, position, bool(stop), row)
            for (sample, position), stop, row in zip(self._places, stops, values, strict=True)
        ]


def _to_host(values: Tensor) -> Tensor:
    if not values.is_cuda:
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
