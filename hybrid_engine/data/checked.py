"""A source whose rows have all been checked once, with what the split needs to know about each."""

from __future__ import annotations

import numpy as np

from hybrid_engine.data.records import BadRow, Kind, Record
from hybrid_engine.data.schema import check_row, kind_of, listed, rename
from hybrid_engine.data.sources import Source
from hybrid_engine.data.split import content_key, first_by_order, keys_array
from hybrid_engine.errors import UserError


class CheckedSource:
    """Rows of one source as records, read again at each access.

    ``rows [n]`` are the row numbers in use (all, or a sample of ``max_rows``), ``keys [n, 3]``
    their random numbers and ``labels [n]`` their labels (-1 where the kind has none). The first
    row's columns decide the kind of all rows. Raises UserError with the first malformed row and the
    number of others.
    """

    def __init__(
        self, source: Source, mapping: dict[str, str], seed: int, max_rows: int = 0
    ) -> None:
        self.name = source.name
        self._source = source
        self._mapping = mapping
        self.kind = self._find_kind()
        keys, labels = self._check_all(seed)
        rows = np.arange(len(labels))
        if max_rows and len(rows) > max_rows:
            rows = np.sort(first_by_order(keys, max_rows))
        self.rows, self.keys, self.labels = rows, keys[rows], labels[rows]

    def record(self, index: int) -> Record:
        """The record at position ``index`` of ``rows``."""
        row = int(self.rows[index])
        fields = check_row(rename(self._source.read(row), self._mapping), self.kind)
        return Record(fields, self._source.origin(row), self.kind)

    def _find_kind(self) -> Kind:
        try:
            return kind_of(rename(self._source.read(0), self._mapping))
        except BadRow as error:
            raise UserError(f"{self._source.origin(0)}: {error}") from None

    def _check_all(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        keys: list[bytes] = []
        labels: list[int] = []
        first_bad, others = "", 0
        for row, raw in self._source.scan():
            try:
                if isinstance(raw, BadRow):
                    raise raw
                fields = check_row(rename(raw, self._mapping), self.kind)
            except BadRow as error:
                others += bool(first_bad)
                first_bad = first_bad or f"{self._source.origin(row)}: {error}"
                continue
            keys.append(content_key(fields, self.kind, seed))
            labels.append(fields["label"] if self.kind.labelled else -1)
        if first_bad:
            raise UserError(first_bad + (f" ({others} more malformed rows)" if others else ""))
        return keys_array(keys), np.array(labels, dtype=np.int8)


def check_mapping_is_used(mapping: dict[str, str], sources: list[Source]) -> None:
    """Refuse a mapped column that no source's first row has: a typing mistake."""
    seen: set[str] = set()
    for source in sources:
        try:
            seen |= set(source.read(0))
        except BadRow as error:
            raise UserError(f"{source.origin(0)}: {error}") from None
    for theirs in mapping:
        if theirs not in seen:
            raise UserError(
                f"data.columns: no source has a column {theirs!r} in its first row "
                f"(found {listed(seen)})"
            )
