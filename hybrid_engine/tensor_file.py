"""Safetensors files written tensor by tensor, so that only one of them need exist at a time.

`safetensors.torch.save_file` wants all tensors of a file at once, and copies them. The format
(https://huggingface.co/docs/safetensors) is a header's length in eight bytes, the header as JSON,
and the bytes of the tensors one after another; spaces may follow the JSON. So room is left for the
header, which is written last.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Of an entry's JSON, besides its name and shape: braces, dtype and two offsets of up to 20 digits.
_ENTRY_BYTES = 120
_ALIGNMENT = 8


def header_room(entries: Iterable[tuple[str, int]], metadata: Mapping[str, str]) -> int:
    """Bytes that a header of these (name, number of dimensions) and this metadata takes at most."""
    room = len(json.dumps({"__metadata__": metadata})) + _ALIGNMENT
    for name, dimensions in entries:
        room += len(json.dumps(name)) + 22 * dimensions + _ENTRY_BYTES
    return room + -room % _ALIGNMENT


class TensorFile:
    """One safetensors file. Close it with :meth:`close`: until then it has no header.

    Args:
        room: from :func:`header_room`, for all that will be added.
    """

    def __init__(self, path: Path, room: int, metadata: Mapping[str, str]) -> None:
        self._file = path.open("wb")
        self._file.seek(8 + room)
        self._room = room
        self._header: dict[str, Any] = {"__metadata__": dict(metadata)}
        self.names: list[str] = []
        self.nbytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor of any device and layout; its bytes are written at once."""
        tensor = tensor.detach().cpu().contiguous()
        if tensor.numel():
            self._file.write(tensor.flatten().view(torch.uint8).numpy().data)
        end = self.nbytes + tensor.nbytes
        self._header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.nbytes, end],
        }
        self.names.append(name)
        self.nbytes = end

    def close(self) -> None:
        header = json.dumps(self._header).encode()
        if len(header) > self._room:
            raise ValueError(f"the header has {len(header)} bytes, and room for {self._room}")
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))
        self._file.close()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A whole file, without a copy of what it holds."""
    room = header_room(((name, t.dim()) for name, t in tensors.items()), metadata)
    file = TensorFile(path, room, metadata)
    for name, tensor in tensors.items():
        file.add(name, tensor)
    file.close()
