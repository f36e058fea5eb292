"""What a rollout holds. Cache and scratch are declared by the C++ program itself, from the objects
that it would run with (`DecodeProgram.declare`); the gather's arena from the parameters' sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybrid_engine.config import GenerationConfig
from hybrid_engine.models import DecoderSpec
from hybrid_kernels import native_available, native_module

from .holdings import Holding
from .models import ModelSize
from .training import Zero

_AHEAD = 4  # `engine.gather`: parts on their way at a time
_ALIGNMENT = 64  # `engine.gather_plan`


@dataclass(frozen=True)
class RolloutShape:
    """Of this rank: prompts, their tokens at most, answers to each, and their tokens at most."""

    prompts: int
    prompt_tokens: int
    samples: int
    new_tokens: int


def rollout_holdings(
    model: ModelSize, shape: RolloutShape, config: GenerationConfig, moment: str, width: int = 4
) -> list[Holding]:
    """Cache and scratch of one rollout; nothing without the native program, whose place a plain
    generator takes.

    Args:
        width: bytes of a cached value: 4 on the CPU.
    """
    if not native_available():
        return []
    declared = _declare(model.spec, shape, config, model.lora_columns)
    cache = declared["blocks"] * declared["block_bytes"] * width // 4
    knobs = ("rlhf.generation.kv_bytes", "rlhf.generation.max_batch")
    return [
        Holding("key-value cache", {moment: cache}, knobs, longest=True),
        Holding("scratch of generation", {moment: declared["scratch_bytes"]}, knobs[1:]),
    ]


def _declare(
    spec: DecoderSpec, shape: RolloutShape, config: GenerationConfig, lora_columns: int
) -> dict[str, int]:
    native = native_module()
    drafts = [shape.new_tokens] * shape.samples if config.reuse_responses else []
    request = native.PromptRequest(
        shape.prompt_tokens, shape.new_tokens, shape.samples, 0.0, drafts
    )
    declared: dict[str, int] = native.DecodeProgram(spec.as_dict()).declare(
        [request] * shape.prompts,
        max_batch=config.max_batch,
        kv_bytes=config.kv_bytes,
        top_k=config.top_k,
        top_p=config.top_p,
        lora_columns=lora_columns,
    )
    return declared


def gather_holdings(model: ModelSize, zero: Zero, slices: int, moment: str) -> list[Holding]:
    """Weights gathered for generation under ZeRO-3, and what they travel in.

    Args:
        slices: ranks that generate together, each with a slice.
    """
    if zero.stage < 3 or zero.ranks == 1:
        return []
    arena, staging = gather_bytes(model, zero.ranks)
    knobs = ("rlhf.generation.inference_tp",)
    return [
        Holding("weights gathered for generation", {moment: arena // slices}, knobs),
        Holding("staging of the gather", {moment: staging}),
    ]


def gather_bytes(model: ModelSize, ranks: int) -> tuple[int, int]:
    """(arena, staging) bytes of `engine.gather`: every parameter at a cache line; `_AHEAD` buffers
    for the shards of a part, this rank's and everyone's.
    """
    arena = 0
    parts = [0] * (model.spec.num_layers + 2)
    for p in model.parameters:
        arena = -(-arena // _ALIGNMENT) * _ALIGNMENT + p.numel * model.itemsize
        parts[_part(p.name, model.spec.num_layers)] += -(-p.numel // ranks) * model.itemsize
    widest = sum(max(parts[slot::_AHEAD], default=0) for slot in range(_AHEAD))
    return arena, (1 + ranks) * widest


def _part(name: str, layers: int) -> int:
    if name.startswith(
        ("decoder.embed_tokens.", "decoder.embed_positions.", "decoder.project_in.")
    ):
        return 0
    pieces = name.split(".")
    return int(pieces[2]) + 1 if pieces[1] == "blocks" else layers + 1


def merge_record(model: ModelSize) -> int:
    """What `adapters_merged` keeps for the weights' bits to come back: a byte a merged weight."""
    merged = {p.name.removesuffix("lora_a") for p in model.parameters if p.name.endswith("lora_a")}
    return sum(p.numel for p in model.parameters if p.name.removesuffix("weight") in merged)


def cache_width(device: str, dtype: str) -> int:
    """Bytes of a cached value: float32 on the CPU, the weights' type on a GPU."""
    return 4 if device == "cpu" else getattr(torch, dtype).itemsize
