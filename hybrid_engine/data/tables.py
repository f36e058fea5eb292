"""Arrow tables as random-access rows: parquet files, saved `datasets` directories, hub datasets.

Rows stay in memory-mapped Arrow files; a rank touches only the pages of the rows it reads.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from hybrid_engine.data.records import BadRow, Origin
from hybrid_engine.errors import UserError

SCAN_ROWS = 1024
DEFAULT_SPLIT = "train"


class TableRows:
    """Rows of a ``pyarrow.Table``, or of a ``datasets.Dataset`` (both slice to columns)."""

    def __init__(self, name: str, table: Any, is_arrow: bool) -> None:
        self.name = name
        self._table = table
        self._is_arrow = is_arrow

    def __len__(self) -> int:
        return len(self._table)

    def origin(self, row: int) -> Origin:
        return Origin(self.name, row + 1, is_table=True)

    def read(self, row: int) -> dict[str, Any]:
        return self._slice(row, row + 1)[0]

    def scan(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        for start in range(0, len(self), SCAN_ROWS):
            yield from enumerate(self._slice(start, min(start + SCAN_ROWS, len(self))), start)

    def _slice(self, start: int, end: int) -> list[dict[str, Any]]:
        if self._is_arrow:
            return self._table.slice(start, end - start).to_pylist()
        columns = self._table[start:end]
        return [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]


def need(module: str, purpose: str) -> ModuleType:
    """Import an optional package, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise UserError(f"{purpose} needs the package {package}: pip install {package}") from None


def open_parquet(path: Path) -> TableRows:
    """Decode a parquet file once, batch by batch, into an unlinked Arrow file, and map that."""
    arrow = need("pyarrow", f"reading {path}")
    parquet = need("pyarrow.parquet", f"reading {path}")
    descriptor, spool = tempfile.mkstemp(suffix=".arrow")
    os.close(descriptor)
    try:
        with (
            parquet.ParquetFile(path) as source,
            arrow.OSFile(spool, "wb") as sink,
            arrow.ipc.new_file(sink, source.schema_arrow) as writer,
        ):
            for batch in source.iter_batches(batch_size=SCAN_ROWS):
                writer.write_batch(batch)
        table = arrow.ipc.open_file(arrow.memory_map(spool)).read_all()
    except arrow.ArrowInvalid as error:
        first_line = str(error).splitlines()[0]
        raise UserError(
            f"{path}: not a readable parquet file ({first_line}); write it again"
        ) from None
    finally:
        os.unlink(spool)  # the mapping keeps the bytes; nothing is left behind
    return TableRows(str(path), table, is_arrow=True)


def open_saved_dataset(path: Path, split: str) -> TableRows:
    """A directory written by ``datasets`` (``save_to_disk``): one dataset, or several splits."""
    datasets = need("datasets", f"reading {path}")
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable saved dataset ({error})") from None
    return TableRows(str(path), pick_split(loaded, str(path), split), is_arrow=False)


def open_hub_dataset(name: str, split: str) -> TableRows:
    """A dataset by its name on the hub, downloaded by ``datasets`` into its own cache."""
    datasets = need("datasets", f"loading the dataset {name!r}")
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # the client raises a dozen unrelated types; all mean: not available
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"data source {name!r} is neither a local file nor a dataset that the hub gave us "
            f"({reason}); "
            "check the spelling and the network, or give a .jsonl, .json, .csv or .parquet file"
        ) from error
    return TableRows(name, pick_split(loaded, name, split), is_arrow=False)


def pick_split(loaded: Any, name: str, split: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    wanted = split or DEFAULT_SPLIT
    if wanted not in loaded:
        raise UserError(
            f"{name}: no split {wanted!r}; it has {', '.join(loaded)}: name one as "
            f"{name}#{next(iter(loaded))}"
        )
    return loaded[wanted]
