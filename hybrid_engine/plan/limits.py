"""How much memory a rank may have, and who says so."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import psutil
import torch

from hybrid_engine.config import RunConfig
from hybrid_engine.distributed.device import compute_device
from hybrid_engine.distributed.env import rank_env
from hybrid_engine.engine.free_memory import control_groups


@dataclass(frozen=True)
class Limits:
    """Bytes of one rank.

    Attributes:
        hard: more than this cannot be had: physical memory and swap, a container's limit, a limit
            of the process, the GPU's memory.
        free: what is to be had now without taking it from anyone, the rank's own included.
        source: what `hard` comes from.
    """

    hard: int
    free: int
    source: str


def ranks_of_this_host(config: RunConfig) -> int:
    """Of a run that is there, or that this process would launch."""
    return max(rank_env().local_world_size, config.num_gpus, 1)


def memory_limits(planned: float = 0.0, local_ranks: int = 1) -> Limits:
    """Of this rank; the `local_ranks` of one host share its memory evenly.

    Args:
        planned: bytes to plan for instead (`--memory-limit`), a rank; 0 looks at the machine.
    """
    if planned:
        return Limits(int(planned), int(planned), "--memory-limit")
    if compute_device().type == "cuda":
        left, most = torch.cuda.mem_get_info()
        return Limits(most, left, "the GPU's memory")
    own = psutil.Process().memory_info().rss
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    whole = [((memory.total + swap.total) // local_ranks, "the machine's memory and swap")]
    free = [memory.available // local_ranks + own]
    for limit, used in control_groups():
        whole.append((limit // local_ranks, "the container's memory limit"))
        free.append(max(limit - used, 0) // local_ranks + own)
    hard, source = min(whole + process_limits(own))
    return Limits(hard, min(hard, *free), source)


def process_limits(resident: int) -> list[tuple[int, str]]:
    """RLIMIT_AS (`ulimit -v`), which counts addresses: those that are taken already hold more than
    what is `resident`.
    """
    if sys.platform == "win32":
        return []
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return []
    taken = psutil.Process().memory_info().vms
    return [(max(limit - taken, 0) + resident, "the limit of the process (ulimit -v)")]
