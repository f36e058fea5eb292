"""The memory of a run: declared once, added up before it starts, compared while it runs."""

from .holdings import Holding, StepPlan, gigabytes
from .limits import Limits, memory_limits
from .planner import NOT_PLANNED, RunPlan, checked, out_of_memory, plan_run
from .process import give_back_freed, trim_heap

__all__ = [
    "NOT_PLANNED",
    "Holding",
    "Limits",
    "RunPlan",
    "StepPlan",
    "checked",
    "gigabytes",
    "give_back_freed",
    "memory_limits",
    "out_of_memory",
    "plan_run",
    "trim_heap",
]
