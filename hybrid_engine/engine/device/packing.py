"""Items of a scheduler's pass as rows for the layer walk, and what each of them draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hybrid_engine.engine.request import Request

from .state import DecodeRow, upload
from .walk import BLOCK, Rows

WHOLE_PROMPT = -1  # csrc/engine/scheduler.h

Item = Any  # PassItem of the native library
Place = tuple[int, int]  # (sample, position in its response)


def decodes(item: Item) -> bool:
    """Whether it feeds a sample's latest token, and nothing else."""
    return item.sample != WHOLE_PROMPT and item.rows == 1 and item.first_draw == item.start


def decode_row(item: Item, request: Request) -> DecodeRow:
    drawn = item.start + 1 - len(request.prompts[item.prompt])
    sample_id = request.sample_ids[item.sample]
    return DecodeRow(item.sample, sample_id, drawn, item.start, tuple(item.blocks))


def places_of(item: Item, request: Request) -> list[Place]:
    """Where its draws belong: row after row; a prompt's row draws for all samples."""
    n, length = request.params.n, len(request.prompts[item.prompt])
    whole = item.sample == WHOLE_PROMPT
    samples = range(item.prompt * n, item.prompt * n + n) if whole else [item.sample]
    rows = range(item.first_draw, item.start + item.rows)
    return [(sample, place + 1 - length) for place in rows for sample in samples]


@dataclass
class PackedItems:
    """Rows of prompts, of preempted samples and of drafts.

    Attributes:
        draws: where each draw belongs.
        draw_rows: the wanted row, counted among the wanted, that each draw is from.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    first_rows: list[int] = field(default_factory=lambda: [0])
    wanted: list[int] = field(default_factory=list)
    draws: list[Place] = field(default_factory=list)
    draw_rows: list[int] = field(default_factory=list)

    def add(self, item: Item, token_at: Callable[[Item, int], int], request: Request) -> None:
        blocks, places = item.blocks, range(item.start, item.start + item.rows)
        draws, rows = places_of(item, request), item.start + item.rows - item.first_draw
        if rows:
            first, each = len(self.wanted), len(draws) // rows
            self.draw_rows += [first + i // each for i in range(len(draws))]
            self.draws += draws
            last = len(self.tokens) + item.rows
            self.wanted += range(last - rows, last)
        self.tokens += [token_at(item, place) for place in places]
        self.positions += places
        self.slots += [blocks[place // BLOCK] * BLOCK + place % BLOCK for place in places]
        self.tables.append(blocks)
        self.lengths.append(item.start + item.rows)
        self.first_rows.append(len(self.tokens))

    def rows(self, device: torch.device) -> Rows:
        return Rows(
            tokens=upload(self.tokens, torch.int64, device),
            positions=upload(self.positions, torch.int32, device),
            slots=upload(self.slots, torch.int64, device),
            block_tables=upload(_padded(self.tables), torch.int32, device),
            kv_lengths=upload(self.lengths, torch.int32, device),
            first_rows=upload(self.first_rows, torch.int32, device),
            wanted=upload(self.wanted, torch.int64, device),
        )


def _padded(tables: Sequence[list[int]]) -> list[list[int]]:
    """Behind a sequence's blocks nothing is read."""
    width = max(map(len, tables))
    return [blocks + [0] * (width - len(blocks)) for blocks in tables]
