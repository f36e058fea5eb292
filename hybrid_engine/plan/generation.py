"""What a rollout holds. Cache and scratch are declared by the C++ program itself, from the objects
that it would run with (`DecodeProgram.declare`); the gather by its own policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybrid_engine.config import GenerationConfig
from hybrid_engine.distributed.numa import system_nodes
from hybrid_engine.engine.gather_plan import aligned, part_of
from hybrid_engine.engine.gather_policy import (
    Group,
    PartSizes,
    pinning_all,
    solve,
    staging_bytes,
)
from hybrid_engine.models import DecoderSpec
from hybrid_kernels import native_available, native_module

from .holdings import Holding
from .models import ModelSize
from .training import Zero


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


def gather_holdings(
    model: ModelSize, zero: Zero, config: GenerationConfig, one_host: bool, moment: str
) -> list[Holding]:
    """Weights gathered for generation under ZeRO-3, and what they travel in, by the policy that
    the engine will solve for; without a limit of the user's, that all layers stay. Of one copy for
    all ranks of a host each has its part, beside what lies in the memory of its gradients; where
    the host has several NUMA nodes, a copy each is planned.
    """
    if zero.stage < 3 or zero.ranks == 1:
        return []
    sizes = part_sizes(model, zero.ranks, config.inference_tp)
    lent = 0 if zero.optimizer_on_host else zero.part(model.trained) * model.itemsize
    near = one_host and len(system_nodes()) <= 1
    group = Group(zero.ranks, one_host, near, lent if near else 0)
    policy = pinning_all(sizes.blocks)
    if config.weight_bytes:
        policy = solve(sizes, group, config.weight_bytes, at_least=True)
    staging = sum(staging_bytes(policy, sizes, group))
    kept = policy.held_bytes(sizes, group) - staging
    knobs = ("rlhf.generation.weight_bytes", "rlhf.generation.inference_tp")
    return [
        Holding("weights gathered for generation", {moment: kept}, knobs),
        Holding("staging of the gather", {moment: staging}),
    ]


def part_sizes(model: ModelSize, ranks: int, slices: int = 1) -> PartSizes:
    """As `engine.gather_plan.part_sizes` finds them in a model that is there.

    Args:
        slices: ranks that generate together, each with as much of every parameter.
    """
    parts: list[list[int]] = [[] for _ in range(model.spec.num_layers + 2)]
    for p in model.parameters:
        parts[part_of(p.name, model.spec.num_layers)].append(p.numel)
    size = model.itemsize
    return PartSizes(
        tuple(sum(aligned(n * size // slices) for n in part) for part in parts),
        tuple(sum(-(-n // ranks) * size for n in part) for part in parts),
    )


def merge_record(model: ModelSize) -> int:
    """What `adapters_merged` keeps for the weights' bits to come back: a byte a merged weight."""
    merged = {p.name.removesuffix("lora_a") for p in model.parameters if p.name.endswith("lora_a")}
    return sum(p.numel for p in model.parameters if p.name.removesuffix("weight") in merged)


def cache_width(device: str, dtype: str) -> int:
    """Bytes of a cached value: float32 on the CPU, the weights' type on a GPU."""
    return 4 if device == "cpu" else getattr(torch, dtype).itemsize
