"""Packed sequences: the tokens of a batch laid end to end, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PackedBatch(NamedTuple):
    """B sequences laid end to end. Sequence b has the places ``cu_seqlens[b]`` to
    ``cu_seqlens[b+1]``; a place is a packed row, or several places share one.

    A row that sequences share (the prompt of a group of answers) is computed once: all but
    attention works on the T rows, attention on the places. T is the number of places where nothing
    is shared.

    A named tuple, because DeepSpeed's ZeRO-3 hooks look for tensors inside tuples.
    """

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int32, counted from zero in each sequence
    cu_seqlens: Tensor  # [B + 1] int32, places
    max_length: int = -1  # longest sequence, kept on the host; -1: not known yet
    row_of: Tensor | None = None  # [places] int64: the row at each place; None: nothing is shared
    place_of: Tensor | None = None  # [T] int64: the first place of each row

    @property
    def num_tokens(self) -> int:
        """T: the rows that are computed."""
        return self.input_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence, int32 ``[B]``."""
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]

    @property
    def longest(self) -> int:
        """``max_length``, read from ``cu_seqlens`` where the maker of the batch did not say it."""
        if self.max_length >= 0:
            return self.max_length
        return int(self.lengths.max()) if self.num_sequences else 0

    def at_places(self, values: Tensor) -> Tensor:
        """Rows ``[T, ...]`` as the sequences have them, ``[places, ...]``."""
        return values if self.row_of is None else _rows(values, self.row_of)

    def at_rows(self, values: Tensor) -> Tensor:
        """The inverse of :meth:`at_places` for values that shared places agree on."""
        return values if self.place_of is None else _rows(values, self.place_of)

    def to(self, device: torch.device | str) -> PackedBatch:
        if self.input_ids.device == torch.device(device):
            return self
        return PackedBatch(
            self.input_ids.to(device),
            self.positions.to(device),
            self.cu_seqlens.to(device),
            self.max_length,
            None if self.row_of is None else self.row_of.to(device),
            None if self.place_of is None else self.place_of.to(device),
        )


def _rows(values: Tensor, index: Tensor) -> Tensor:
    return values.index_select(0, index.to(values.device))


def pack(
    sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int] | None = None
) -> PackedBatch:
    """Lay token lists end to end. Empty sequences are allowed and own no row.

    With ``prompt_lengths`` sequences that begin with the same prompt, of their first that many
    tokens, share its rows. Every row gives the same bits as without.
    """
    lengths = [len(sequence) for sequence in sequences]
    flat = [token for sequence in sequences for token in sequence]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    positions = [position for length in lengths for position in range(length)]
    batch = PackedBatch(
        input_ids=torch.tensor(flat, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int32),
        cu_seqlens=starts.to(torch.int32),
        max_length=max(lengths, default=0),
    )
    return batch if prompt_lengths is None else _share_prompts(batch, sequences, prompt_lengths)


def _share_prompts(
    batch: PackedBatch, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]
) -> PackedBatch:
    rows: list[int] = []  # of every place
    places: list[int] = []  # of every row
    prompts: dict[tuple[int, ...], int] = {}  # the first row of each
    for sequence, length in zip(sequences, prompt_lengths, strict=True):
        prompt = tuple(sequence[:length])
        first = prompts.setdefault(prompt, len(places))
        shared = len(prompt) if first < len(places) else 0
        start, own = len(rows), len(sequence) - shared
        rows += [*range(first, first + shared), *range(len(places), len(places) + own)]
        places += range(start + shared, start + len(sequence))
    if len(rows) == len(places):
        return batch
    place_of = torch.tensor(places)
    return batch._replace(
        input_ids=batch.input_ids[place_of],
        positions=batch.positions[place_of],
        row_of=torch.tensor(rows),
        place_of=place_of,
    )


def unpack(values: Tensor, batch: PackedBatch) -> list[Tensor]:
    """Packed rows ``[T, ...]`` as one tensor ``[length, ...]`` a sequence; views, if no row is
    shared.
    """
    return list(batch.at_places(values).split(batch.lengths.tolist()))


def response_rows(batch: PackedBatch, prompt_lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows that predict the tokens after each prompt, and those tokens: both int64 ``[N]``.

    The first response token is predicted by the prompt's last row, so a prompt has at least
    one token.
    """
    lengths = batch.lengths.tolist()
    if len(prompt_lengths) != len(lengths):
        raise ValueError(f"{len(prompt_lengths)} prompt lengths for {len(lengths)} sequences")
    for length, prompt in zip(lengths, prompt_lengths, strict=True):
        if not 1 <= prompt <= length:
            raise ValueError(f"prompt length {prompt} outside 1..{length} (its sequence)")
    spans = [[(prompt, length)] for length, prompt in zip(lengths, prompt_lengths, strict=True)]
    return span_rows(batch, spans)


def span_rows(
    batch: PackedBatch, spans: Sequence[Sequence[tuple[int, int]]]
) -> tuple[Tensor, Tensor]:
    """Rows that predict the tokens at places ``[begin, end)`` of each sequence, and those tokens:
    both int64 ``[N]``.

    Nothing predicts a first token, so ``begin`` is at least 1.
    """
    if len(spans) != batch.num_sequences:
        raise ValueError(f"spans of {len(spans)} sequences for {batch.num_sequences} sequences")
    rows: list[Tensor] = []
    starts, lengths = batch.cu_seqlens[:-1].tolist(), batch.lengths.tolist()
    for start, length, parts in zip(starts, lengths, spans, strict=True):
        for begin, end in parts:
            if not 1 <= begin <= end <= length:
                raise ValueError(f"span {begin}..{end} outside 1..{length} (its sequence)")
            rows.append(torch.arange(start + begin - 1, start + end - 1))
    place = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
    place = place.to(batch.input_ids.device)
    return _rows_at(batch, place), batch.at_places(batch.input_ids)[place + 1]


def last_rows(batch: PackedBatch) -> Tensor:
    """Row of every sequence's last token, int64 ``[B]``; sequences must not be empty."""
    return _rows_at(batch, batch.cu_seqlens[1:].long() - 1)


def _rows_at(batch: PackedBatch, places: Tensor) -> Tensor:
    return places if batch.row_of is None else batch.row_of[places]
