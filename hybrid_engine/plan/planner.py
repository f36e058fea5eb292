"""The plan of a whole run on one rank, and what it says before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module

from hybrid_engine.config import RunConfig
from hybrid_engine.engine.deepspeed_config import settings_of
from hybrid_engine.engine.free_memory import free_memory
from hybrid_engine.engine.train_engine import load_deepspeed
from hybrid_engine.errors import UserError
from hybrid_engine.models import UnsupportedFamily, load_tokenizer
from hybrid_kernels import native_available

from .holdings import StepPlan, gigabytes
from .limits import Limits, memory_limits, ranks_of_this_host
from .oom import is_out_of_memory
from .process import resident_bytes
from .sources import model_directory
from .steps import FROZEN, Planner
from .verdict import Knob, advice, at_least, at_most, describe, holders, knobs_of


@dataclass(frozen=True)
class RunPlan:
    """What the steps of a run hold on one rank, and what that rank may have."""

    config: RunConfig
    steps: tuple[StepPlan, ...]
    limits: Limits
    ranks: int

    def step(self, name: str) -> StepPlan | None:
        """ "sft", "reward" or "rlhf", if the run has it."""
        return next((plan for plan in self.steps if plan.step == name), None)

    def decided(self, config: RunConfig) -> RunConfig:
        """The settings of a run with what they leave to the plan filled in."""
        frozen_models = self.config.rlhf.frozen_models
        return replace(config, rlhf=replace(config.rlhf, frozen_models=frozen_models))

    def bytes(self) -> dict[str, dict[str, int]]:
        """Peaks by step and phase."""
        return {p.step: {phase: p.peak(phase) for phase in p.phases} for p in self.steps}

    def lines(self) -> list[str]:
        return describe(self.steps, self.limits)

    @property
    def impossible(self) -> bool:
        """Whether it needs more than there is, however short the rows turn out to be."""
        return at_least(self.steps)[2] > self.limits.hard

    @property
    def tight(self) -> bool:
        """Whether it needs more than is free if rows are as long as the settings allow."""
        return at_most(self.steps)[2] > self.limits.free

    def complaint(self) -> str:
        """Does not fit, because ..., turn this knob."""
        if self.impossible:
            plan, phase, needed = at_least(self.steps)
            limit, what, bound = self.limits.hard, self.limits.source, "at least"
        else:
            plan, phase, needed = at_most(self.steps)
            limit, what, bound = self.limits.free, "what is free now", "up to"
        return (
            f"does not fit: {plan.step} needs {bound} {gigabytes(needed)} a rank while it "
            f"{phase}s, which is more than {gigabytes(limit)}, {what} "
            f"({holders(plan, phase)}); {self._what_to_turn(limit)}"
        )

    def _what_to_turn(self, limit: int) -> str:
        if self.knobs:
            return "turn " + " and ".join(map(str, self.knobs)) + ", with which it fits"
        return (
            "no setting that this plan knows makes it fit: take a smaller model, more ranks with "
            "--zero-stage 3, or a machine with more memory"
        )

    @cached_property
    def knobs(self) -> list[Knob]:
        """What would make it fit, tried."""
        limit = self.limits.hard if self.impossible else self.limits.free
        return advice(self.config, self._planned, limit, self.ranks)

    def _planned(self, config: RunConfig) -> tuple[StepPlan, ...]:
        return _steps(config, self.ranks, self.steps[0].baseline)


# What libraries take by the first step's end: measured, 24 MB in one process, 70 on a rank of two,
# whose collectives have threads of their own.
_FIRST_USE, _FIRST_USE_OF_A_RANK = 25_000_000, 70_000_000
NOT_PLANNED = (
    "a model runs through transformers' own module, or there is no compiler for the native program"
)


def plan_run(config: RunConfig, ranks: int, steps: tuple[int, ...] | None = None) -> RunPlan | None:
    """The plan of a run, of `steps` of it (by default all), from its settings and the models'
    config.json alone. On a GPU its own config says whether frozen models are offloaded, where the
    settings leave that to the plan.

    None where nothing can be said: a model runs through transformers' own module, or generation
    without the native program.

    Raises:
        UserError: a model or DeepSpeed file that cannot be read.
    """
    config = replace(config, steps=steps) if steps else config
    if not native_available():
        return None
    try:
        planned = _steps(config, ranks, baseline(config, ranks))
    except UnsupportedFamily:
        return None
    limits = memory_limits(config.memory_limit * 1e9, ranks_of_this_host(config))
    plan = RunPlan(config, planned, limits, ranks)
    return _offloading(plan) if _should_offload(plan) else plan


def _should_offload(plan: RunPlan) -> bool:
    config, step_3 = plan.config, plan.step("rlhf")
    if step_3 is None or config.model.device == "cpu" or config.rlhf.frozen_models != "auto":
        return False
    names = {f"{name}: weights" for name in FROZEN}
    frozen = sum(h.bytes_at("evaluate.score") for h in step_3.holdings if h.name in names)
    host_has_room = frozen * ranks_of_this_host(config) <= free_memory()
    return host_has_room and at_most([step_3])[2] > plan.limits.free


def _offloading(plan: RunPlan) -> RunPlan:
    config = replace(plan.config, rlhf=replace(plan.config.rlhf, frozen_models="offload"))
    steps = _steps(config, plan.ranks, plan.steps[0].baseline)
    return replace(plan, config=config, steps=steps)


def _steps(config: RunConfig, ranks: int, process: int) -> tuple[StepPlan, ...]:
    return tuple(Planner(config, settings_of(config), ranks, process).steps())


def baseline(config: RunConfig, ranks: int) -> int:
    """Resident bytes of a rank's process with the libraries that a run loads, as this one has them;
    0 for a GPU, whose tensors are planned alone.
    """
    if config.model.device != "cpu":
        return 0
    load_deepspeed()
    load_tokenizer(model_directory(config.model.actor_model))  # brings most of transformers
    import_module("torch._dynamo")  # as the first model and the first optimizer do: 150 MB
    return resident_bytes() + (_FIRST_USE if ranks == 1 else _FIRST_USE_OF_A_RANK)


def checked(plan: RunPlan, check: str, warn: Callable[[str], None]) -> None:
    """Refuses what cannot fit, and warns of what may not.

    Args:
        check: `memory_check`: "refuse" or "warn".

    Raises:
        UserError: it cannot fit, and `check` is "refuse".
    """
    if plan.impossible and check == "refuse":
        raise UserError(f"{plan.complaint()}. --memory-check warn tries all the same")
    if plan.impossible or plan.tight:
        warn(plan.complaint())


def out_of_memory(error: BaseException, plan: RunPlan, step: str, phase: str) -> UserError | None:
    """What to say of an allocation that failed in a phase of a step: the phase, the largest
    holders, the knobs. None for any other error.
    """
    if not is_out_of_memory(error):
        return None
    where, planned = f"out of memory in {step or 'the run'}", plan.step(step)
    if planned is None or phase not in planned.phases:
        return UserError(f"{where} ({phase or 'between phases'}): {error}")
    options = " or ".join(knobs_of(planned, phase)[:4])
    return UserError(
        f"{where}, phase {phase}: up to {gigabytes(planned.peak(phase))} were planned for it, and "
        f"{gigabytes(plan.limits.free)} were free at the start. The largest holders: "
        f"{holders(planned, phase)}. Turn down {options}; python -m hybrid_engine.plan says what "
        "fits, and --resume continues from the last checkpoint"
    )
