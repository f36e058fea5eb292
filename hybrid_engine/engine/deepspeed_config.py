"""DeepSpeed's configuration: our defaults, then the user's JSON over them.

A few settings follow from the way this package trains and cannot be the user's: the batch algebra
(losses are normalised by global token counts), the optimizer and its schedule (typed options of
ours), and who owns the accumulation boundary. Naming one of those in the JSON is an error rather
than a setting that is quietly ignored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hybrid_engine.config import RunConfig
from hybrid_engine.errors import UserError

Settings = dict[str, Any]

_OWNED = {
    "train_batch_size": "set --sft.batch-size, --reward.batch-size, --rlhf.prompts-per-iteration",
    "train_micro_batch_size_per_gpu": "micro-batches are packed by --STEP.max-tokens-per-pass",
    "gradient_accumulation_steps": "passes follow from --STEP.max-tokens-per-pass",
    "managed_gradient_accumulation": "the training loop owns the accumulation boundary",
    "scheduler": "the schedule is set by --STEP.optimizer.schedule and its neighbours",
    "optimizer": "AdamW is set by --STEP.optimizer.learning-rate and its neighbours",
    "gradient_clipping": "clipping is set by --STEP.optimizer.max-grad-norm",
    "prescale_gradients": "losses are normalised by global token counts",
    "gradient_predivide_factor": "losses are normalised by global token counts",
}

# Elements a communication bucket: DeepSpeed's default of 5e8 would allocate 2 GB of fp32 up front.
_BUCKET_ELEMENTS = 20_000_000


def read_user_json(path: str | Path) -> Settings:
    """Read a DeepSpeed JSON file, leaving out "auto" values (they mean: whoever trains decides).

    Raises:
        UserError: no such file, invalid JSON (with line and column), not an object, a setting of
        ours.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the DeepSpeed configuration {path}: {error}") from error
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}"
        ) from error
    if not isinstance(settings, dict):
        raise UserError(
            f"{path}: expected a JSON object with DeepSpeed settings, got {type(settings).__name__}"
        )
    return without_owned(settings, str(path))


def settings_of(config: RunConfig) -> Settings:
    """The user's DeepSpeed JSON, with the ZeRO stage in it.

    Raises:
        UserError: --zero-stage and the file contradict each other.
    """
    settings = read_user_json(config.deepspeed) if config.deepspeed else {}
    zero = settings.setdefault("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f"{config.deepspeed}: zero_optimization must be an object, got {zero}")
    stage = zero.setdefault("stage", config.zero_stage)
    if config.zero_stage and stage != config.zero_stage:
        raise UserError(
            f"--zero-stage is {config.zero_stage} but {config.deepspeed} says {stage}; give one"
        )
    return settings


def without_owned(settings: Settings, origin: str) -> Settings:
    """Check a user's settings and strip "auto" values.

    Raises:
        UserError: it sets something that this package must decide.
    """
    settings = _strip_auto(settings)
    optimizer = settings.get("optimizer", {})
    if (
        isinstance(optimizer, dict)
        and optimizer.get("type") in ("Adam", "AdamW")
        and not optimizer.get("params")
    ):
        settings.pop("optimizer")  # all of its numbers were "auto", and AdamW is what we use
    scheduler = settings.get("scheduler", {})
    if isinstance(scheduler, dict) and not scheduler.get("params"):
        settings.pop("scheduler", None)
    for key, reason in _OWNED.items():
        if key in settings:
            raise UserError(f'{origin}: remove "{key}": {reason}')
    return settings


def complete(
    user: Settings, module_dtype: torch.dtype, world_size: int, max_grad_norm: float
) -> Settings:
    """The full configuration for `deepspeed.initialize`: defaults < `user` < what we own.

    Raises:
        UserError: the user's precision settings contradict the parameters' dtype.
    """
    _check_precision(user, module_dtype)
    settings = _merge(_defaults(module_dtype), user)
    stage = zero_stage(settings)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"zero_optimization.stage is {stage!r}; give 0, 1, 2 or 3")
    owned = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if clips_outside(settings) else max_grad_norm,
    }
    return settings | owned


def zero_stage(settings: Settings) -> int:
    return settings.get("zero_optimization", {}).get("stage", 0)


def clips_outside(settings: Settings) -> bool:
    """Whether DeepSpeed would run the bare optimizer: it reports no gradient norm there."""
    half = any(settings.get(key, {}).get("enabled", False) for key in ("bf16", "fp16"))
    return zero_stage(settings) == 0 and not half


def _defaults(module_dtype: torch.dtype) -> Settings:
    return {
        "bf16": {"enabled": module_dtype == torch.bfloat16},
        "fp16": {"enabled": module_dtype == torch.float16},
        "zero_optimization": {
            "stage": 0,
            "overlap_comm": False,
            "reduce_bucket_size": _BUCKET_ELEMENTS,
            "allgather_bucket_size": _BUCKET_ELEMENTS,
            "stage3_prefetch_bucket_size": 0,
        },
        # Ours is torch's AdamW in every case, offloaded or not.
        "zero_force_ds_cpu_optimizer": False,
    }


def _check_precision(user: Settings, module_dtype: torch.dtype) -> None:
    for key, dtype in (
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("fp16", torch.float16),
    ):
        wanted = user.get(key, {}).get("enabled")
        if wanted is not None and bool(wanted) != (module_dtype == dtype):
            raise UserError(
                f'the DeepSpeed configuration says "{key}": {{"enabled": {json.dumps(wanted)}}} '
                "but the parameters "
                f"are {str(module_dtype).removeprefix('torch.')}; set --dtype, and leave {key} "
                'out or "auto"'
            )


def _merge(base: Settings, over: Settings) -> Settings:
    """Nested dictionaries merge key by key; anything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _strip_auto(settings: Settings) -> Settings:
    kept = {}
    for key, value in settings.items():
        if value == "auto":
            continue
        kept[key] = _strip_auto(value) if isinstance(value, dict) else value
    return kept
