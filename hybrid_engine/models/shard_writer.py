"""Weights as Hugging Face lays them out: one safetensors file, or several and an index."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hybrid_engine.tensor_file import TensorFile, header_room

_METADATA = {"format": "pt"}
_MOST_DIMENSIONS = 4  # of a weight


class ShardWriter:
    """Fills files up to a size, tensor by tensor; their number is known, and named, at the end.

    Args:
        max_bytes: of a file; a tensor that is larger has one of its own.
        names: of all tensors that will come, for the files' headers.
    """

    def __init__(self, target: Path, max_bytes: int, names: Sequence[str]) -> None:
        self._target, self._max_bytes = target, max_bytes
        self._room = header_room(((name, _MOST_DIMENSIONS) for name in names), _METADATA)
        self._files = [self._open(0)]

    def _open(self, number: int) -> TensorFile:
        return TensorFile(self._path(number), self._room, _METADATA)

    def _path(self, number: int) -> Path:
        return self._target / f"shard-{number}"

    def add(self, name: str, tensor: Tensor) -> None:
        file = self._files[-1]
        if file.names and file.nbytes + tensor.nbytes > self._max_bytes:
            file.close()
            file = self._open(len(self._files))
            self._files.append(file)
        file.add(name, tensor)

    def close(self) -> None:
        self._files[-1].close()
        if len(self._files) == 1:
            self._path(0).rename(self._target / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, file in enumerate(self._files):
            final = f"model-{number + 1:05d}-of-{len(self._files):05d}.safetensors"
            self._path(number).rename(self._target / final)
            weight_map |= dict.fromkeys(file.names, final)
        total = sum(file.nbytes for file in self._files)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(self._target / "model.safetensors.index.json", index)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
