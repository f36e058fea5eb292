"""Which device this rank computes on.

Models live there. What stages exchange (log-probabilities, rewards, advantages) is small, and stays
on the CPU: a model takes its arguments from where they are, and brings its results back.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from hybrid_engine.distributed.env import rank_env
from hybrid_engine.errors import UserError

DEVICES = ("cpu", "cuda")
_chosen = torch.device("cpu")


def use_device(kind: str) -> torch.device:
    """Choose once for this process, before the process group is joined: the CPU, or of a machine's
    GPUs the one with this rank's local number.

    Raises:
        UserError: there is no such GPU.
    """
    global _chosen
    if kind not in DEVICES:
        raise UserError(f"device {kind!r}: give {' or '.join(DEVICES)}")
    _chosen = torch.device(kind) if kind == "cpu" else _own_gpu()
    return _chosen


def _own_gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise UserError(
            "device cuda: torch finds no GPU (is this a CPU build of torch, or is the driver "
            "missing?); give --device cpu"
        )
    local_rank, count = rank_env().local_rank, torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"device cuda: rank {local_rank} of this machine has no GPU of its own, of which there "
            f"are {count}; start at most {count} ranks (--num-gpus {count})"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def compute_device() -> torch.device:
    """What :func:`use_device` chose; the CPU in a process that never asked."""
    return _chosen


def group_backend() -> str:
    """Of the process group: tensors travel by what serves the memory that they are in."""
    return "gloo" if _chosen.type == "cpu" else "cpu:gloo,cuda:nccl"


def weights_backend() -> str:
    """Of a group in which nothing but parameters travels."""
    return "gloo" if _chosen.type == "cpu" else "nccl"


def on_own_device() -> AbstractContextManager[object]:
    """For threads, which begin on the first GPU."""
    return nullcontext() if _chosen.type == "cpu" else torch.cuda.device(_chosen)
