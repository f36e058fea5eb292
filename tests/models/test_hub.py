"""Hub names: what is asked for, and which weights are taken."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from hybrid_engine.errors import UserError
from hybrid_engine.models import LoRAConfig, load_causal_lm, save_adapter

from .peers import ragged, save_causal, worst_logit_gap

CLUTTER = (
    "pytorch_model.bin",
    "modeling_opt.py",
    "tf_model.h5",
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "onnx/model.safetensors",
)


class FakeHub:
    """``snapshot_download`` over one local repository, with the hub's pattern rules."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache = repository, cache
        self.peer = save_causal("opt", repository)
        self.fetched: list[str] = []

    def snapshot_download(
        self, name: str, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        target = self.cache / name
        for path in self.repository.rglob("*"):
            relative = path.relative_to(self.repository).as_posix()
            wanted = any(fnmatch(relative, pattern) for pattern in allow_patterns)
            refused = any(fnmatch(relative, pattern) for pattern in ignore_patterns)
            if path.is_file() and wanted and not refused:
                self.fetched.append(relative)
                (target / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / relative)
        return str(target)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "repository", tmp_path / "cache")
    for name in CLUTTER:
        (fake.repository / name).parent.mkdir(exist_ok=True)
        (fake.repository / name).write_bytes(b"not for us")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def test_only_safetensors_and_side_files_are_fetched(hub: FakeHub) -> None:
    model = load_causal_lm("owner/model")
    assert sorted(hub.fetched) == ["config.json", "generation_config.json", "model.safetensors"]
    assert worst_logit_gap(model, hub.peer, ragged(), "right") < 1e-4


def test_a_repository_with_pickles_alone_is_read_without_code(hub: FakeHub) -> None:
    weights = hub.repository / "model.safetensors"
    torch.save(load_file(weights), hub.repository / "pytorch_model.bin")
    weights.unlink()
    with pytest.warns(UserWarning, match="weights_only=True"):
        model = load_causal_lm("owner/model")
    assert worst_logit_gap(model, hub.peer, ragged(), "right") < 1e-4


def test_a_repository_that_is_no_model(hub: FakeHub) -> None:
    (hub.repository / "config.json").unlink()
    with pytest.raises(UserError, match=r"owner/model: the hub repository has no config\.json"):
        load_causal_lm("owner/model")


def test_an_adapter_by_name(hub: FakeHub, tmp_path: Path) -> None:
    save_causal("llama", tmp_path / "base")
    model = load_causal_lm(tmp_path / "base", lora=LoRAConfig(2))
    save_adapter(model, tmp_path / "adapter")
    shutil.rmtree(hub.repository)
    shutil.copytree(tmp_path / "adapter", hub.repository)
    again = load_causal_lm("someone/adapter")
    assert sorted(hub.fetched) == ["adapter_config.json", "adapter_model.safetensors"]
    assert again.adapter == model.adapter
