"""Loading: Hugging Face directories and adapters into our modules, one copy of every weight."""

from __future__ import annotations

import math
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hybrid_engine.errors import UserError

from . import foreign
from .checkpoint_files import CONFIG, Base, Source, locate, read_json
from .families import family_of_type, spec_from_hf
from .fingerprint import Fingerprint
from .heads import CausalLM, NativeModel, ScalarModel
from .lora import LoRAConfig, apply_lora
from .origin import Origin, find
from .quantized import quantize_base
from .spec import DecoderSpec, UnsupportedFamily
from .weight_loader import WeightLoader


def load_causal_lm(
    path: str | Path,
    dtype: str | torch.dtype = torch.float32,
    lora: LoRAConfig | None = None,
    trainable_layers: int = 0,
    seed: int = 0,
    base: str | Path | None = None,
    base_bits: int = 0,
) -> CausalLM | foreign.ForeignCausalLM:
    """Load a language model from a Hugging Face directory or hub name.

    ``trainable_layers = k > 0`` freezes all but the last k blocks and the final norm; ``lora``
    freezes all but the adapters it adds, whose A matrices are drawn from ``seed``. A PEFT adapter
    is loaded on the model that it names (or on ``base``), which is frozen; the adapter is
    trainable. With ``base_bits`` 4 or 8 what lies under an adapter is quantized. A family without a
    table runs through transformers, with a warning. Raises UserError for anything wrong with the
    path or the files.
    """
    origin = find(path, base)
    if origin.adapter is not None and origin.adapter.classifier:
        raise UserError(f"{path}: an adapter of a sequence classifier, not of a language model")
    config = read_config(origin.directory)
    training = _Training(lora, trainable_layers, seed, base_bits)
    try:
        spec = spec_from_hf(config)
    except UnsupportedFamily as reason:
        training.refuse_foreign(origin, reason)
        return foreign.load_causal_lm(origin.directory, as_dtype(dtype), str(reason))
    with torch.device("meta"):
        model = CausalLM(spec)
    _materialise(model, as_dtype(dtype))
    model.tie_head()
    _fill(model, config, origin, training)
    return model


def load_scalar_model(
    path: str | Path,
    dtype: str | torch.dtype = torch.float32,
    lora: LoRAConfig | None = None,
    trainable_layers: int = 0,
    seed: int = 0,
    base: str | Path | None = None,
    base_bits: int = 0,
) -> ScalarModel | foreign.ForeignScalarModel:
    """Load a reward or value model.

    A classification directory with one label gives its own ``score``, and so does a classifier's
    adapter. A causal one gets a fresh head, normal with variance 1 / (h + 1) (Stiennon et al. 2020,
    arXiv:2009.01325); ``seed`` draws it, and the A matrices of adapters.
    """
    origin = find(path, base)
    config = read_config(origin.directory)
    training = _Training(lora, trainable_layers, seed, base_bits)
    try:
        spec = spec_from_hf(config)
    except UnsupportedFamily as reason:
        training.refuse_foreign(origin, reason)
        return foreign.load_scalar_model(origin.directory, as_dtype(dtype), str(reason), seed)
    with torch.device("meta"):
        model = ScalarModel(spec)
    _materialise(model, as_dtype(dtype))
    init_score(model.score.weight, seed)
    _fill(model, config, origin, training)
    return model


class _Training(NamedTuple):
    """What of a model is to be trained."""

    lora: LoRAConfig | None
    layers: int
    seed: int
    base_bits: int

    def refuse_foreign(self, origin: Origin, reason: UnsupportedFamily) -> None:
        if self.lora is not None or self.layers or self.base_bits or origin.adapter is not None:
            raise UserError(
                f"LoRA and trainable_layers need a family with a native decoder, and this one has "
                f"none: {reason}; train all weights or choose another model"
            ) from reason

    def check(self, origin: Origin) -> None:
        if self.base_bits and self.lora is None and origin.adapter is None:
            raise UserError(f"a base in {self.base_bits} bits cannot be trained; add an adapter")
        if self.lora is not None and self.layers:
            raise UserError("lora and trainable_layers are both set; choose one")
        if origin.adapter is not None and (self.lora is not None or self.layers):
            raise UserError(
                f"{origin.adapter.directory} is an adapter, which is trained as it is; to train "
                "other weights, merge it first (HybridEngine.from_pretrained(...)."
                "save_pretrained(...)), and start from the result"
            )


def _fill(model: NativeModel, config: Any, origin: Origin, training: _Training) -> None:
    """Weights into a model of the right shape, an adapter on it, and what is trained. The model is
    in evaluation mode, where no adapter drops anything.
    """
    training.check(origin)
    adapts = training.lora is not None or origin.adapter is not None
    loader = WeightLoader(
        model,
        family_of_type(config.model_type),
        origin.directory,
        Fingerprint() if adapts else None,
    )
    loader.run()
    model.eval()
    model.source = Source.read(origin.directory)
    if loader.fingerprint is not None:
        model.base = Base(origin.name, loader.fingerprint.hexdigest())
    if origin.adapter is not None and model.base is not None:
        origin.adapter.check_base(*astuple(model.base))
        origin.adapter.attach_to(model)
    elif training.lora is not None:
        apply_lora(model, training.lora, training.seed)
    elif training.layers:
        train_top_layers(model, training.layers)
    if training.base_bits:
        quantize_base(model, training.base_bits)


def read_config(directory: Path) -> Any:
    """The transformers config object of a directory; code in the directory is never run."""
    from transformers import AutoConfig

    read_json(directory / CONFIG)  # damaged JSON is reported with its path
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers' validators raise many types
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{directory / CONFIG}: transformers refuses it ({reason})") from error


def context_of(path: str | Path) -> float:
    """Longest sequence of the model at a directory or hub name; infinite where it states none."""
    config = read_config(locate(path)).get_text_config()
    return getattr(config, "max_position_embeddings", None) or math.inf


def spec_of(path: str | Path) -> DecoderSpec:
    """The native decoder of the model at a directory or hub name; no weights are read.

    Raises:
        UnsupportedFamily: it has none.
    """
    return spec_from_hf(read_config(locate(path)))


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """``"float32"``, ``"bfloat16"`` or ``"float16"`` as a torch dtype."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype {dtype!r}: give float32, bfloat16 or float16")
    return getattr(torch, dtype)


@torch.no_grad()
def init_score(weight: Tensor, seed: int) -> None:
    """Fill a fresh scalar head ``[1, h]`` in place."""
    generator = torch.Generator().manual_seed(seed)
    std = 1.0 / math.sqrt(weight.shape[1] + 1)
    weight.copy_(torch.randn(weight.shape, generator=generator) * std)


def _materialise(model: nn.Module, dtype: torch.dtype) -> None:
    model.to(dtype)
    model.to_empty(device="cpu")


def train_top_layers(model: NativeModel, count: int) -> None:
    """Freeze everything but the last ``count`` blocks, the final norm and ``score``."""
    decoder = model.decoder
    if not 0 < count <= len(decoder.blocks):
        raise UserError(f"trainable_layers is {count}; the model has {len(decoder.blocks)} layers")
    model.requires_grad_(False)
    trained = [*decoder.blocks[-count:], getattr(decoder, "final_norm", None)]
    for module in [*trained, getattr(model, "score", None)]:
        if module is not None:
            module.requires_grad_(True)
