"""What a DeepSpeed file may not say, refused by name before a model is loaded.

DeepSpeed itself would stop later, in words that name no setting, or in the middle of a step.
docs/deepspeed.md lists what has been tried.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from hybrid_engine.errors import UserError

_SECTION = "zero_optimization"


class Limit(NamedTuple):
    """One setting below zero_optimization, and why it cannot have a value other than ``idle``."""

    path: tuple[str, ...]
    why: str
    idle: tuple[Any, ...] = (None, False, 0)
    stages: tuple[int, ...] = (0, 1, 2, 3)
    devices: tuple[str, ...] = ("cpu", "cuda")


_NOT_NVME = (None, "none", "cpu")
_QUANTIZES = "DeepSpeed quantizes by CUDA kernels alone; give --device cuda, or leave it out"
LIMITS = (
    Limit(("zero_quantized_weights",), _QUANTIZES, devices=("cpu",)),
    Limit(("zero_quantized_nontrainable_weights",), _QUANTIZES, devices=("cpu",)),
    Limit(("zero_quantized_gradients",), _QUANTIZES, devices=("cpu",)),
    Limit(
        ("offload_optimizer", "device"),
        "optimizer state elsewhere than in memory cannot be written to checkpoints; give cpu",
        _NOT_NVME,
    ),
    Limit(
        ("offload_param", "device"),
        "generation reads parameters in memory; give cpu",
        _NOT_NVME,
    ),
    Limit(
        ("offload_optimizer", "ratio"),
        "it needs DeepSpeed's own CPU optimizer, and ours is torch's AdamW; leave it out",
        (None, 1, 1.0),
    ),
    Limit(
        ("overlap_comm",),
        "losses are normalised over passes, which DeepSpeed overlaps under stages 2 and 3 alone",
        stages=(1,),
    ),
    Limit(
        ("round_robin_gradients",),
        "a checkpoint would not continue bit for bit, because it deals parameters to ranks in an "
        "order of its own; leave it out",
        stages=(1, 2),
    ),
    Limit(
        ("stage3_module_granularity_threshold",),
        "DeepSpeed's backward pass then finds parameters that it has let go of; leave it out",
    ),
    Limit(("mics_shard_size",), "DeepSpeed has removed it", (None, -1)),
)


def check_supported(settings: dict[str, Any], device: str) -> None:
    """Looks through a user's settings.

    Args:
        device: "cpu" or "cuda", where the models are.

    Raises:
        UserError: one of them cannot be used.
    """
    zero = settings.get(_SECTION) or {}
    for limit in LIMITS:
        value: Any = zero
        for key in limit.path:
            value = value.get(key) if isinstance(value, dict) else None
        applies = device in limit.devices and zero.get("stage", 0) in limit.stages
        if applies and value not in limit.idle:
            name = ".".join((_SECTION, *limit.path))
            raise UserError(f"the DeepSpeed configuration sets {name} to {value}: {limit.why}")
