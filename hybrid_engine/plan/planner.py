"""The plan of a whole run on one rank, and what it says before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from hybrid_engine.config import RunConfig
from hybrid_engine.engine.deepspeed_config import settings_of
from hybrid_engine.engine.train_engine import load_deepspeed
from hybrid_engine.errors import UserError
from hybrid_engine.models import UnsupportedFamily
from hybrid_kernels import native_available

from .holdings import StepPlan, gigabytes
from .limits import Limits, memory_limits
from .measure import resident_bytes
from .steps import Planner
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
            f"{_DOING.get(phase, phase)}s, which is more than {gigabytes(limit)}, {what} "
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

    def out_of_memory(self, step: str, phase: str) -> str:
        """What to say when it happened all the same."""
        plan = self.step(step)
        if plan is None or phase not in plan.phases:
            return f"out of memory in {step} while in phase {phase!r}"
        options = " or ".join(knobs_of(plan, phase)[:4])
        return (
            f"out of memory in {step} while it {_DOING.get(phase, phase)}s, for which up to "
            f"{gigabytes(plan.peak(phase))} were planned and {gigabytes(self.limits.free)} were "
            f"free when it began; the largest: {holders(plan, phase)}. Turn {options}"
        )


_DOING = {"load": "load"}  # phases are verbs


def plan_run(config: RunConfig, ranks: int, steps: tuple[int, ...] | None = None) -> RunPlan | None:
    """The plan of a run, of `steps` of it (by default all), from its settings and the models'
    config.json alone.

    None where nothing can be said: a model runs through transformers' own module, or generation
    without the native program.

    Raises:
        UserError: a model or DeepSpeed file that cannot be read.
    """
    config = replace(config, steps=steps) if steps else config
    if not native_available():
        return None
    try:
        planned = _steps(config, ranks, baseline(config))
    except UnsupportedFamily:
        return None
    return RunPlan(config, planned, memory_limits(config.memory_limit * 1e9), ranks)


def _steps(config: RunConfig, ranks: int, process: int) -> tuple[StepPlan, ...]:
    return tuple(Planner(config, settings_of(config), ranks, process).steps())


def baseline(config: RunConfig) -> int:
    """Resident bytes of this process with all libraries that a run loads, measured; 0 for a GPU,
    whose tensors are planned alone.
    """
    if config.model.device != "cpu":
        return 0
    load_deepspeed()
    return resident_bytes()


def free_for_generation(plan: StepPlan, limits: Limits) -> int:
    """Bytes that weights gathered for generation and the key-value cache may share: what is free
    beside everything else that step 3 holds while it generates.
    """
    shared = ("key-value cache", "weights gathered for generation", "staging of the gather")
    others = [holding for holding in plan.holdings if holding.name not in shared]
    return limits.free - replace(plan, holdings=tuple(others)).peak("generate")


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
