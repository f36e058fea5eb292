"""Adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

A directory that we write opens in PEFT and one that PEFT wrote opens here, with the same logits.
What PEFT can say and we cannot compute is refused by name, never left out.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid_engine.errors import UserError

from .checkpoint_files import ADAPTER_CONFIG, ShardReader, open_shard, read_json
from .families import SCORE
from .gathered import gathered
from .heads import NativeModel, ScalarModel
from .lora import Adapter, LoRAConfig, attach, by_linear, factors
from .lora_places import Place, adaptable, target_modules

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_CLASSIFIER = "SEQ_CLS"
# The hash lies where PEFT keeps what it does not interpret, so that it neither warns of it nor
# drops it when it trains the adapter further and saves it.
_NOTES, _HASH = "auto_mapping", "base_sha256"

# Settings that we follow, or that change nothing once the factors are there.
_KNOWN = {
    *("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("base_model_name_or_path", "revision", "modules_to_save", "init_lora_weights"),
    *("inference_mode", "fan_in_fan_out", "peft_version", "megatron_core", "qalora_group_size"),
    *("runtime_config", "ensure_weight_tying", _NOTES),
}
# Other initialisations change the base too.
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class AdapterFile:
    """A PEFT directory: what its ``adapter_config.json`` says."""

    directory: Path
    config: LoRAConfig  # target_modules aside: the tensors say which layers there are
    classifier: bool
    base: str
    revision: str  # of the base, on the hub
    base_sha256: str | None

    @classmethod
    def read(cls, directory: Path) -> AdapterFile:
        """Raises UserError for what is no LoRA adapter, or more than that."""
        path = directory / ADAPTER_CONFIG
        settings = read_json(path)
        _check_settings(path, settings)
        try:
            config = LoRAConfig(
                int(settings["r"]),
                float(settings["lora_alpha"]),
                float(settings.get("lora_dropout") or 0.0),
                use_rslora=bool(settings.get("use_rslora")),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: r and lora_alpha must be numbers ({error!r})") from error
        return cls(
            directory,
            config,
            classifier=settings.get("task_type") == _CLASSIFIER,
            base=settings.get("base_model_name_or_path") or "",
            revision=settings.get("revision") or "",
            base_sha256=(settings.get(_NOTES) or {}).get(_HASH),
        )

    def check_base(self, name: str, sha256: str) -> None:
        """Whether the adapter was trained on the base whose weights hash to ``sha256``.

        Raises:
            UserError: it was not. A warning says where an adapter records nothing.
        """
        if self.base_sha256 is None:
            warnings.warn(
                f"{self.directory / ADAPTER_CONFIG} records no hash of its base: whether the "
                f"adapter was trained on {name} cannot be checked",
                stacklevel=2,
            )
        elif self.base_sha256 != sha256:
            raise UserError(
                f"{self.directory} was trained on another base: its {ADAPTER_CONFIG} records "
                f"weights with hash {self.base_sha256[:12]}, and those of {name} have "
                f"{sha256[:12]}; give the base that it was trained on"
            )

    @property
    def weights(self) -> Path:
        """The file of the factors."""
        path = next((self.directory / n for n in _WEIGHTS if (self.directory / n).is_file()), None)
        if path is None:
            raise UserError(f"{self.directory}: no {_WEIGHTS[0]}")
        return path

    def sha256(self) -> str:
        """Of the two files."""
        files = (self.directory / ADAPTER_CONFIG, self.weights)
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()

    @torch.no_grad()
    def attach_to(self, model: NativeModel) -> None:
        """Adds the adapter, trainable, to its base; a classifier's ``score`` comes with it.

        Raises:
            UserError: weights that are missing, damaged, too many or of another shape.
        """
        path = self.weights
        shard = open_shard(path)
        names = set(shard.names)
        places = [p for p in adaptable(model.spec) if names & set(_tensor_names(p))]
        if not places:
            raise UserError(f"{path}: holds no LoRA factors of a layer of this model's blocks")
        attach(model, self.config, places)
        wanted = dict(_destinations(model, self.classifier))
        _check_names(path, names, set(wanted))
        for name, rows in wanted.items():
            _copy(shard, name, rows)


def write_adapter(model: NativeModel, target: Path | None) -> None:
    """``adapter_config.json`` and the factors into ``target``; None where another rank writes.

    Under ZeRO-3 every rank must call this.
    """
    if model.adapter is None or model.base is None:
        raise ValueError("only a model that was loaded from a directory can be saved")
    tensors = dict(_adapter_tensors(model))
    if target is None:
        return
    from safetensors.torch import save_file

    save_file(tensors, target / _WEIGHTS[0], metadata={"format": "pt"})
    text = json.dumps(_settings(model, model.adapter), indent=2, sort_keys=True)
    (target / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")


def _settings(model: NativeModel, adapter: Adapter) -> dict[str, Any]:
    config, scalar = adapter.config, isinstance(model, ScalarModel)
    assert model.base is not None
    return {
        "peft_type": "LORA",
        "task_type": _CLASSIFIER if scalar else "CAUSAL_LM",
        "base_model_name_or_path": model.base.name,
        _NOTES: {_HASH: model.base.sha256},
        "r": config.r,
        "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "target_modules": target_modules(adaptable(model.spec), adapter.places),
        "fan_in_fan_out": any(place.transposed for place in adapter.places),
        "modules_to_save": ["score"] if scalar else None,
        "bias": "none",
        "inference_mode": True,
    }


def _adapter_tensors(model: NativeModel) -> Iterator[tuple[str, Tensor]]:
    """Names and copies of what is trained, layer by layer."""
    assert model.adapter is not None
    for linear, places in by_linear(model, model.adapter.places):
        with gathered([linear.lora_a, linear.lora_b]):
            for place in places:
                pair = factors(linear, place.part)
                for name, tensor in zip(_tensor_names(place), pair, strict=True):
                    yield name, tensor.cpu().clone()
    if isinstance(model, ScalarModel):
        with gathered([model.score.weight]):
            yield _PREFIX + SCORE, model.score.weight.detach().cpu().clone()


def _tensor_names(place: Place) -> tuple[str, str]:
    return _PREFIX + place.module + _A, _PREFIX + place.module + _B


def _destinations(model: NativeModel, classifier: bool) -> Iterator[tuple[str, Tensor]]:
    """What the file must hold, and where it goes."""
    assert model.adapter is not None
    for linear, places in by_linear(model, model.adapter.places):
        for place in places:
            yield from zip(_tensor_names(place), factors(linear, place.part), strict=True)
    if classifier and isinstance(model, ScalarModel):
        yield _PREFIX + SCORE, model.score.weight.detach()


def _copy(shard: ShardReader, name: str, rows: Tensor) -> None:
    tensor = shard.tensor(name)
    if tensor.shape != rows.shape:
        raise UserError(
            f"{shard.path}: {name} has shape {list(tensor.shape)}; {ADAPTER_CONFIG} and the base "
            f"imply {list(rows.shape)}"
        )
    rows.copy_(tensor)


def _check_names(path: Path, found: set[str], wanted: set[str]) -> None:
    for problem, names in (("lacks", wanted - found), ("holds", found - wanted)):
        if names:
            advice = (
                "copy it again"
                if problem == "lacks"
                else "adapters of the blocks' linear layers are all that is supported"
            )
            raise UserError(f"{path}: {problem} {min(names)} (of {len(names)} such); {advice}")


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path}: peft_type is {kind}; only LORA is supported")
    task, saved = settings.get("task_type"), settings.get("modules_to_save") or []
    refused = {key: value for key, value in settings.items() if value and key not in _KNOWN}
    if settings.get("bias", "none") != "none":
        refused["bias"] = settings["bias"]
    if settings.get("init_lora_weights") not in _PLAIN_STARTS:
        refused["init_lora_weights"] = settings["init_lora_weights"]
    if not set(saved) <= ({"score", "classifier"} if task == _CLASSIFIER else set()):
        refused["modules_to_save"] = saved
    if task not in (None, "CAUSAL_LM", _CLASSIFIER):
        refused["task_type"] = task
    if refused:
        key, value = next(iter(refused.items()))
        raise UserError(f"{path}: sets {key} to {json.dumps(value)}, which is not supported")
