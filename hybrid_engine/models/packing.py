"""Packed sequences: the tokens of a batch laid end to end, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PackedBatch(NamedTuple):
    """B sequences of T tokens together; sequence b is ``input_ids[cu_seqlens[b]:cu_seqlens[b+1]]``.

    A named tuple, because DeepSpeed's ZeRO-3 hooks look for tensors inside tuples.
    """

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int32, counted from zero in each sequence
    cu_seqlens: Tensor  # [B + 1] int32
    max_length: int = -1  # longest sequence, kept on the host; -1: not known yet

    @property
    def num_tokens(self) -> int:
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

    def to(self, device: torch.device | str) -> PackedBatch:
        ids, positions = self.input_ids.to(device), self.positions.to(device)
        return PackedBatch(ids, positions, self.cu_seqlens.to(device), self.max_length)


def pack(sequences: Sequence[Sequence[int]]) -> PackedBatch:
    """Lay token lists end to end. Empty sequences are allowed and own no row."""
    lengths = [len(sequence) for sequence in sequences]
    flat = [token for sequence in sequences for token in sequence]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    positions = [position for length in lengths for position in range(length)]
    return PackedBatch(
        input_ids=torch.tensor(flat, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int32),
        cu_seqlens=starts.to(torch.int32),
        max_length=max(lengths, default=0),
    )


def unpack(values: Tensor, batch: PackedBatch) -> list[Tensor]:
    """Views of packed rows ``[T, ...]``, one tensor ``[length, ...]`` a sequence."""
    return list(values.split(batch.lengths.tolist()))


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
    row = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
    row = row.to(batch.input_ids.device)
    return row, batch.input_ids[row + 1]


def last_rows(batch: PackedBatch) -> Tensor:
    """Row of every sequence's last token, int64 ``[B]``; sequences must not be empty."""
    return batch.cu_seqlens[1:].long() - 1
