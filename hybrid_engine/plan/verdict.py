"""Fits, or does not, because ...; turn this knob."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hybrid_engine.config import RunConfig
from hybrid_engine.errors import UserError
from hybrid_engine.fields import settings

from .holdings import Holding, StepPlan, gigabytes
from .limits import Limits

Plans = Sequence[StepPlan]
PlanOf = Callable[[RunConfig], Plans]


@dataclass(frozen=True)
class Knob:
    """A setting turned to a value."""

    path: str
    value: Any

    def turned(self, config: RunConfig) -> RunConfig:
        """Raises UserError where the config classes refuse the value."""
        return _replaced(config, self.path.split("."), self.value)

    def __str__(self) -> str:
        shown = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{settings()[self.path].option} {shown}"


def _replaced(config: Any, path: list[str], value: Any) -> Any:
    if len(path) > 1:
        value = _replaced(getattr(config, path[0]), path[1:], value)
    return replace(config, **{path[0]: value})


def largest(plans: Plans, size: Callable[[StepPlan, str], int]) -> tuple[StepPlan, str, int]:
    """(step, phase, bytes) of the largest of all phases."""
    sizes = [(plan, phase, size(plan, phase)) for plan in plans for phase in plan.phases]
    return max(sizes, key=lambda found: found[2])


def at_most(plans: Plans) -> tuple[StepPlan, str, int]:
    """The largest phase with the longest rows that the settings allow."""
    return largest(plans, StepPlan.peak)


def at_least(plans: Plans) -> tuple[StepPlan, str, int]:
    """The largest phase however short the rows are."""
    return largest(plans, StepPlan.certain)


def advice(config: RunConfig, plan_of: PlanOf, limit: int, ranks: int) -> list[Knob]:
    """Knobs that make the run fit into `limit` bytes, as few and as harmless as will do; empty
    where none of those known here does.

    Those that change no result come first, one alone, then together; then those that train
    something smaller. Each is tried: what is named fits.
    """
    for family in (_harmless(config, ranks), [*_harmless(config, ranks), *_smaller(config)]):
        for values in family:
            for knob in values:
                if _fits(config, [knob], plan_of, limit):
                    return [knob]
        turned: list[Knob] = []
        for values in family:
            for knob in values:
                if _fits(config, [*turned, knob], plan_of, limit):
                    return _without_idle([*turned, knob], config, plan_of, limit)
            if values and _valid(config, [*turned, values[-1]]):
                turned.append(values[-1])
    return []


def _without_idle(knobs: list[Knob], config: RunConfig, plan_of: PlanOf, limit: int) -> list[Knob]:
    """Drops what is not needed."""
    for knob in list(knobs):
        rest = [other for other in knobs if other is not knob]
        if _fits(config, rest, plan_of, limit):
            knobs = rest
    return knobs


def _fits(config: RunConfig, knobs: list[Knob], plan_of: PlanOf, limit: int) -> bool:
    turned = _turn(config, knobs)
    return turned is not None and at_most(plan_of(turned))[2] <= limit


def _valid(config: RunConfig, knobs: list[Knob]) -> bool:
    return _turn(config, knobs) is not None


def _turn(config: RunConfig, knobs: list[Knob]) -> RunConfig | None:
    try:
        for knob in knobs:
            config = knob.turned(config)
    except UserError:
        return None
    return config


def _harmless(config: RunConfig, ranks: int) -> list[list[Knob]]:
    """Settings that change no result, each with ever smaller values."""
    knobs = []
    for step, longest in _longest_rows(config):
        path = f"{step}.max_tokens_per_pass"
        now = getattr(config, step).max_tokens_per_pass
        knobs.append([Knob(path, value) for value in _halved(now, longest)])
    if 3 in config.steps:
        knobs.append(
            [
                Knob("rlhf.generation.max_batch", value)
                for value in _halved(config.rlhf.generation.max_batch, 1)
            ]
        )
    if config.model.device != "cpu" and config.rlhf.frozen_models == "resident":
        knobs.append([Knob("rlhf.frozen_models", "offload")])
    if not config.model.gradient_checkpointing:
        knobs.append([Knob("model.gradient_checkpointing", True)])
    if ranks > 1 and not config.deepspeed:
        stages = [Knob("zero_stage", stage) for stage in range(config.zero_stage + 1, 4)]
        knobs.append(stages)
    return knobs


def _smaller(config: RunConfig) -> list[list[Knob]]:
    """Settings that train less, or on shorter rows."""
    model = config.model
    knobs = []
    if not model.lora_r and not model.trainable_layers and not model.reward_trainable_layers:
        knobs.append([Knob("model.lora_r", 16)])
    if model.dtype == "float32" and (model.device == "cuda" or 3 not in config.steps):
        knobs.append([Knob("model.dtype", "bfloat16")])
    if 3 in config.steps:
        knobs.append(
            [
                Knob("rlhf.prompts_per_iteration", value)
                for value in _halved(config.rlhf.prompts_per_iteration, 8)
            ]
        )
    return knobs


def _longest_rows(config: RunConfig) -> Iterator[tuple[str, int]]:
    """Steps of the run with the tokens below which a pass does not get."""
    data = config.data
    whole = data.max_prompt_tokens + config.rlhf.generation.max_new_tokens
    rows = {1: ("sft", data.max_length), 2: ("reward", 2 * data.max_length), 3: ("rlhf", whole)}
    yield from (rows[step] for step in config.steps)


def _halved(value: int, least: int) -> list[int]:
    values = []
    while value > least:
        value = max(value // 2, least)
        values.append(value)
    return values


def describe(plans: Plans, limits: Limits) -> list[str]:
    """The plan in a few lines: every step's phases, and what is largest in the largest of them."""
    lines = [
        f"memory: {plan.step} "
        + ", ".join(f"{phase} {gigabytes(plan.peak(phase))}" for phase in plan.phases)
        for plan in plans
    ]
    plan, phase, most = at_most(plans)
    lines.append(
        f"memory: at most {gigabytes(most)} a rank ({plan.step}, {phase}), of "
        f"{gigabytes(limits.free)} free: {holders(plan, phase)}"
    )
    return lines


def holders(plan: StepPlan, phase: str, count: int = 4) -> str:
    """The largest of a phase: "policy: gradients 0.54 GB, ..."."""
    shown = [f"{holding.name} {gigabytes(n)}" for holding, n in plan.top(phase, count)]
    if plan.baseline > 50_000_000:
        shown.append(f"the process itself {gigabytes(plan.baseline)}")
    return ", ".join(shown)


def knobs_of(plan: StepPlan, phase: str) -> list[str]:
    """Options of the settings that make the largest holders of a phase smaller."""
    known = settings()
    top: list[Holding] = [holding for holding, _ in plan.top(phase)]
    paths = dict.fromkeys(path for holding in top for path in holding.knobs)
    return [known[path].option for path in paths]
