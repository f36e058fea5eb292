"""The memory of a run: declared once, added up before it starts, compared while it runs."""

from .holdings import Holding, StepPlan, gigabytes
from .limits import Limits, memory_limits
from .measure import PhasePeaks, give_back_freed
from .planner import RunPlan, free_for_generation, plan_run

__all__ = [
    "Holding",
    "Limits",
    "PhasePeaks",
    "RunPlan",
    "StepPlan",
    "free_for_generation",
    "gigabytes",
    "give_back_freed",
    "memory_limits",
    "plan_run",
]
