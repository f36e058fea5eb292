"""Tensors of which every rank holds a part, in files that any number of ranks can read.

    DIRECTORY/part-00000.safetensors    what rank 0 wrote: stretches of flattened tensors

The file says where in its tensor each stretch begins. A reader asks for other stretches, which it
puts together from the files that hold some of them, reading no byte more. Neither side ever holds
a whole tensor, or hears of another rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hybrid_engine.distributed.collectives import rank, world_size
from hybrid_engine.errors import UserError
from hybrid_engine.tensor_file import write_tensors

_STARTS = "starts"  # in a file's metadata: name -> where its stretch begins


class Part(NamedTuple):
    """A stretch of a flattened tensor.

    Attributes:
        start: index of its first element in the flattened tensor.
        values: [n] a view, to be written or to be filled.
        everywhere: every rank holds the same stretch, so that each writes its share of it.
    """

    start: int
    values: Tensor
    everywhere: bool = False


def write_parts(directory: Path, parts: Mapping[str, Part]) -> None:
    """This rank's file; every rank calls this, with or without parts."""
    directory.mkdir(parents=True, exist_ok=True)
    own = {name: _share(part) if part.everywhere else part for name, part in parts.items()}
    own = {name: part for name, part in own.items() if part.values.numel()}
    starts = {name: part.start for name, part in own.items()}
    values = {name: part.values for name, part in own.items()}
    write_tensors(_file(directory, rank()), values, {_STARTS: json.dumps(starts)})


def _share(part: Part) -> Part:
    count = part.values.numel()
    begin, end = (count * r // world_size() for r in (rank(), rank() + 1))
    return Part(part.start + begin, part.values[begin:end])


def _file(directory: Path, of_rank: int) -> Path:
    return directory / f"part-{of_rank:05d}.safetensors"


class _Stretch(NamedTuple):
    start: int
    end: int
    file: Any


class PartReader:
    """Reads what `ranks` ranks wrote into a directory.

    Raises:
        UserError: a file is missing or damaged.
    """

    def __init__(self, directory: Path, ranks: int) -> None:
        self.directory = directory
        self._open = ExitStack()
        self._stretches: dict[str, list[_Stretch]] = {}
        for of_rank in range(ranks):
            self._index(_file(directory, of_rank))
        for stretches in self._stretches.values():
            stretches.sort(key=lambda stretch: stretch.start)

    def __enter__(self) -> PartReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def __contains__(self, name: str) -> bool:
        return name in self._stretches

    def _index(self, path: Path) -> None:
        if not path.exists():
            raise UserError(
                f"{path} is missing: the checkpoint is damaged; resume from another one"
            )
        try:
            file = self._open.enter_context(safe_open(path, framework="pt"))
            starts = json.loads(file.metadata()[_STARTS])
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise UserError(
                f"{path} is damaged ({error}); resume from another checkpoint"
            ) from error
        for name, start in starts.items():
            count = file.get_slice(name).get_shape()[0]
            self._stretches.setdefault(name, []).append(_Stretch(start, start + count, file))

    def fill(self, name: str, part: Part) -> None:
        """Reads a stretch into `part.values`, in their dtype.

        Raises:
            UserError: not all of it was written.
        """
        at, end = part.start, part.start + part.values.numel()
        for stretch in self._stretches.get(name, ()):
            if stretch.start <= at < stretch.end:
                upto = min(stretch.end, end)
                piece = stretch.file.get_slice(name)[at - stretch.start : upto - stretch.start]
                part.values[at - part.start : upto - part.start].copy_(piece)
                at = upto
            if at == end:
                return
        if at < end:
            raise UserError(
                f"{self.directory} does not hold {name} from element {at} on: it was written by a "
                "run with other settings or another model; resume with those of the interrupted run"
            )
