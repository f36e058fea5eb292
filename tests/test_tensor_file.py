"""Files written tensor by tensor against safetensors' own reader."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hybrid_engine.tensor_file import TensorFile, header_room, write_tensors

TENSORS = {
    'a "quoted" name / é': torch.randn(3, 5).T,
    "empty": torch.zeros(0, 7),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "half": torch.randn(5).bfloat16()[::2],
    "other half": torch.randn(3).half(),
    "integers": torch.arange(4, dtype=torch.int64),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "flags": torch.tensor([True, False, True]),
    "four": torch.randn(2, 1, 3, 2, requires_grad=True),
}


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_tensors(path, TENSORS, {"format": "pt", "note": "1 < 2"})
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "1 < 2"}


def test_nothing_is_a_file_too(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {}, {"format": "pt"})
    assert load_file(tmp_path / "file") == {}


def test_a_name_that_nobody_announced(tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "file", header_room([("a", 1)], {}), {})
    for name in ("a", "b" * 200):
        file.add(name, torch.zeros(1))
    with pytest.raises(ValueError, match="and room for"):
        file.close()
