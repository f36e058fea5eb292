"""Finding a Hugging Face checkpoint and reading its tensors, one file at a time."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hybrid_engine.errors import UserError

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's
GENERATION_CONFIG = "generation_config.json"
_SIDE_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
# Not the variants and copies beside them.
_WEIGHTS = ["model.safetensors", "model-*.safetensors", "adapter_model.safetensors"]
_ELSEWHERE = ["*/*"]  # other formats (onnx/, original/) live in folders of a hub repository


def locate(path_or_name: str | Path) -> Path:
    """The local directory of a model: itself, or the snapshot of a hub repository.

    Raises UserError when neither exists. Only data is fetched, never code.
    """
    directory = locate_any(path_or_name)
    if is_adapter(directory):
        raise UserError(f"{path_or_name}: an adapter, where a whole model is needed")
    return directory


def locate_any(path_or_name: str | Path) -> Path:
    """:func:`locate`, of a model or an adapter."""
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        if not (path / CONFIG).is_file() and not is_adapter(path):
            raise UserError(f"{path}: no {CONFIG}; give a directory in Hugging Face's format")
        return path
    name = str(path_or_name)
    if path.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(
            f"{name}: no such model directory; give a directory with {CONFIG} and safetensors "
            "files, or a hub name such as HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    return _download(name)


def is_adapter(directory: Path) -> bool:
    """Whether a directory is PEFT's: an adapter without the model that it adapts."""
    return (directory / ADAPTER_CONFIG).is_file() and not (directory / CONFIG).is_file()


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def fetch(patterns: list[str]) -> Path:
        try:
            return Path(
                snapshot_download(name, allow_patterns=patterns, ignore_patterns=_ELSEWHERE)
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{name}: neither a local directory nor a model the hub would give us ({reason})"
            ) from error

    directory = fetch([*_SIDE_FILES, *_WEIGHTS])
    if is_adapter(directory):
        return directory
    if not weight_files(directory):
        directory = fetch([*_SIDE_FILES, "pytorch_model*.bin"])
    if not (directory / CONFIG).is_file():
        raise UserError(f"{name}: the hub repository has no {CONFIG}")
    return directory


def weight_files(directory: Path) -> list[Path]:
    """Shards in the order of the index, or the single file; safetensors before torch's pickle."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = directory / f"{stem}.{suffix}.index.json"
        if index.is_file():
            shards = dict.fromkeys(_weight_map(index).values())
            return [directory / shard for shard in shards]
        single = directory / f"{stem}.{suffix}"
        if single.is_file():
            return [single]
    return []


def _weight_map(index: Path) -> dict[str, str]:
    table = read_json(index)
    if not isinstance(table.get("weight_map"), dict):
        raise UserError(f"{index}: no weight_map; download it again")
    return table["weight_map"]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def architectures(directory: Path) -> list[str]:
    """The classes that the directory's config.json names; none where it is silent."""
    return read_json(directory / CONFIG).get("architectures") or []


def has_score_head(directory: Path) -> bool:
    """Whether the directory calls itself a classifier: a reward or value model with its head."""
    return any(name.endswith("ForSequenceClassification") for name in architectures(directory))


@dataclass(frozen=True)
class Base:
    """What an adapter was trained on."""

    name: str  # absolute path of a directory, or hub name
    sha256: str  # of its weights

    @staticmethod
    def name_of(path_or_name: str | Path) -> str:
        path = Path(path_or_name).expanduser()
        return str(path.resolve()) if path.is_dir() else str(path_or_name)


@dataclass(frozen=True)
class Source:
    """Where a model came from: what ``save_model`` must hand on unchanged."""

    directory: Path
    config: dict[str, Any]  # config.json as it was read
    generation_config: str | None  # text of generation_config.json

    @classmethod
    def read(cls, directory: Path) -> Source:
        generation = directory / GENERATION_CONFIG
        text = generation.read_text(encoding="utf-8") if generation.is_file() else None
        return cls(directory, read_json(directory / CONFIG), text)


@dataclass(frozen=True)
class ShardReader:
    """One weight file: its names, and the tensors one by one."""

    path: Path
    names: Sequence[str]
    tensor: Callable[[str], Tensor]


def open_shard(path: Path) -> ShardReader:
    """Open a weight file; a missing or damaged one is a UserError that names it.

    Every tensor of a safetensors file is read through a mapping of its own, which goes with it:
    what has been touched of a mapping stays resident, in the end the whole file.
    """
    if not path.is_file():
        raise UserError(f"{path}: the checkpoint's index lists this file, but it is missing")
    if path.suffix == ".bin":
        state = _load_pickle(path)
        return ShardReader(path, list(state), state.__getitem__)

    def mapped() -> Any:
        return safe_open(path, framework="pt", device="cpu")

    def tensor(name: str) -> Tensor:
        with mapped() as file:
            return file.get_tensor(name)

    try:
        with mapped() as file:
            return ShardReader(path, list(file.keys()), tensor)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged safetensors file ({error}); copy it again") from error


def _load_pickle(path: Path) -> dict[str, Tensor]:
    warnings.warn(
        f"{path}: a torch pickle, read with weights_only=True (no code in it is run); "
        "safetensors is the safer format",
        stacklevel=2,
    )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises a different type for every kind of damage
        raise UserError(f"{path}: not a readable torch weights file ({error})") from error
