"""Which rank this process is, as told by torchrun, the DeepSpeed launcher, our own launcher or
SLURM."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from hybrid_engine.errors import UserError

# SLURM job ids grow without bound; ports of ours are drawn from this many above the base.
_SLURM_PORT_BASE = 20000
_SLURM_PORT_RANGE = 20000


@dataclass(frozen=True)
class RankEnv:
    """Position of this process among all processes of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0  # 0: no rendezvous needed, the process is alone

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise UserError(
                f"RANK is {self.rank} with WORLD_SIZE {self.world_size}; it must lie in [0, "
                "WORLD_SIZE)"
            )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def export(self, environ: MutableMapping[str, str]) -> None:
        """Write the variables that DeepSpeed and torch read, in torchrun's names."""
        environ["RANK"] = str(self.rank)
        environ["WORLD_SIZE"] = str(self.world_size)
        environ["LOCAL_RANK"] = str(self.local_rank)
        environ["LOCAL_WORLD_SIZE"] = str(self.local_world_size)
        environ["MASTER_ADDR"] = self.master_addr
        environ["MASTER_PORT"] = str(self.master_port)


def rank_env(environ: Mapping[str, str] | None = None) -> RankEnv:
    """Read the rank variables; a process without any is rank 0 of 1.

    torchrun, the DeepSpeed launcher and ours set RANK and WORLD_SIZE; under SLURM only a step
    (`srun`) has one task a rank, so a batch script outside `srun` counts as a single process.

    Raises:
        UserError: a variable is missing or not a number.
    """
    environ = os.environ if environ is None else environ
    if "WORLD_SIZE" in environ:
        return _from_torchrun(environ)
    if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _from_slurm(environ)
    return RankEnv()


def _from_torchrun(environ: Mapping[str, str]) -> RankEnv:
    world_size = _integer(environ, "WORLD_SIZE")
    if world_size == 1:
        return RankEnv()
    local_rank = _integer(environ, "LOCAL_RANK")
    return RankEnv(
        rank=_integer(environ, "RANK"),
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=int(
            environ.get("LOCAL_WORLD_SIZE", environ.get("LOCAL_SIZE", world_size))
        ),
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_integer(environ, "MASTER_PORT"),
    )


def _from_slurm(environ: Mapping[str, str]) -> RankEnv:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "localhost")
    job = _integer(environ, "SLURM_JOB_ID")
    port = environ.get("MASTER_PORT") or str(_SLURM_PORT_BASE + job % _SLURM_PORT_RANGE)
    return RankEnv(
        rank=_integer(environ, "SLURM_PROCID"),
        world_size=_integer(environ, "SLURM_STEP_NUM_TASKS"),
        local_rank=_integer(environ, "SLURM_LOCALID"),
        local_world_size=_tasks_on_node(environ),
        master_addr=environ.get("MASTER_ADDR") or first_slurm_node(nodes),
        master_port=int(port),
    )


def _tasks_on_node(environ: Mapping[str, str]) -> int:
    """Tasks of this step on this node; SLURM writes runs of equal counts as `2(x3),1`."""
    counts = environ.get("SLURM_STEP_TASKS_PER_NODE", environ["SLURM_STEP_NUM_TASKS"])
    expanded: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(
                f"SLURM_STEP_TASKS_PER_NODE is {counts!r}; expected a form such as 2(x3),1"
            )
        expanded += [int(match[1])] * int(match[2] or 1)
    return expanded[int(environ.get("SLURM_NODEID", "0"))]


def first_slurm_node(nodes: str) -> str:
    """The first host of a SLURM node list: `gpu[003-005,9],login` -> `gpu003`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise UserError(
            f"cannot read a host name from the SLURM node list {nodes!r}; set MASTER_ADDR"
        )
    return match[1] + (match[2] or "") + (match[3] or "")


def _integer(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name)
    if value is None or not value.isdigit():
        raise UserError(
            f"environment variable {name} is {value!r} but WORLD_SIZE or SLURM_STEP_NUM_TASKS "
            "says that this "
            "is one of several ranks; start with --num-gpus N, torchrun, deepspeed or srun"
        )
    return int(value)
