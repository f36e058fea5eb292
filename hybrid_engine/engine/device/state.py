"""What a decode step reads and writes beside the weights: the state of its rows, at fixed
addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .walk import BLOCK, Rows


@dataclass(frozen=True)
class DecodeRow:
    """A sample that decodes: its next step feeds its latest token."""

    sample: int  # its place in the rollout
    sample_id: int  # names its random stream
    drawn: int  # tokens of its response so far
    cached: int  # tokens in the cache
    blocks: tuple[int, ...]


# Columns of the state; a row's block table follows. An idle row does not advance: it writes into a
# block that is nobody's, again and again.
_SAMPLE, _ID, _PLACE, _LENGTH, _LIVE, _TABLE = range(6)


class DecodeState:
    """Rows, block tables and latest tokens on the device; the step itself moves them on.

    Args:
        batch: most rows.
        width: blocks of the longest sequence.
        samples: of the rollout.
        idle_block: a cache block for rows without a sample.
    """

    def __init__(
        self, batch: int, width: int, samples: int, idle_block: int, device: torch.device
    ) -> None:
        self.batch, self.width, self.samples = batch, width, samples
        self._idle = [samples, 0, 0, 0, 0] + [idle_block] * width
        self._rows = torch.tensor([self._idle] * batch, device=device)
        self._first_rows = torch.arange(batch + 1, dtype=torch.int32, device=device)
        # The last entry belongs to idle rows.
        self._latest = torch.zeros(samples + 1, dtype=torch.int64, device=device)
        self._uploaded: list[DecodeRow] = []

    def fits(self, batch: int, width: int, samples: int) -> bool:
        return batch <= self.batch and width <= self.width and samples <= self.samples

    def set_rows(self, rows: Sequence[DecodeRow]) -> None:
        """Says who decodes next. Nothing is sent where the device knows: the rows of the step
        before, each a token further, in the blocks that they had.
        """
        rows = list(rows)
        if rows != self._uploaded:
            values = [self._values(row) for row in rows]
            values += [self._idle] * (self.batch - len(rows))
            self._rows.copy_(upload(values, torch.int64, self._rows.device), non_blocking=True)
        self._uploaded = [
            DecodeRow(row.sample, row.sample_id, row.drawn + 1, row.cached + 1, row.blocks)
            for row in rows
        ]

    def set_latest(self, samples: Tensor, tokens: Tensor) -> None:
        """The tokens ``[N]`` that the next step of these samples ``[N]`` feeds; both int64."""
        self._latest.index_copy_(0, samples, tokens)

    def advance(self, bucket: int) -> Rows:
        """One token further; part of the recorded step.

        Returns:
            The rows to compute, of which there are ``bucket``.
        """
        state = self._rows[:bucket]
        live = state[:, _LIVE]
        state[:, _PLACE] += live
        state[:, _LENGTH] += live
        position = (state[:, _LENGTH] - 1).clamp(min=0)
        block = state[:, _TABLE:].gather(1, (position // BLOCK)[:, None])[:, 0]
        return Rows(
            tokens=self._latest.index_select(0, state[:, _SAMPLE]),
            positions=position.int(),
            slots=block * BLOCK + position % BLOCK,
            block_tables=state[:, _TABLE:].int().contiguous(),
            kv_lengths=(position + 1).int(),
            first_rows=self._first_rows[: bucket + 1],
        )

    def keys(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """(sample, sample id, place in the response) of what the first ``count`` rows of the step
        that has just run give; int64 ``[count]`` each.
        """
        state = self._rows[:count]
        sample, sample_id = state[:, _SAMPLE].contiguous(), state[:, _ID].contiguous()
        return sample, sample_id, (state[:, _PLACE] - 1).contiguous()

    def _values(self, row: DecodeRow) -> list[int]:
        table = [*row.blocks, *self._idle[_TABLE + len(row.blocks) :]]
        return [row.sample, row.sample_id, row.drawn, row.cached, 1, *table]


def upload(values: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A host list on the device, sent from pinned memory without waiting for it."""
    host = torch.tensor(values, dtype=dtype)
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
