"""Consecutive ranks of one host that work together on something: who they are, how they talk."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybrid_engine.distributed.collectives import all_gather_json, barrier, rank, world_size
from hybrid_engine.distributed.process_group import initialise
from hybrid_engine.distributed.shared_memory import share_memory
from hybrid_engine.errors import UserError


def check_divides(size: int, setting: str) -> None:
    """Raises UserError unless the ranks divide into groups of ``size``, named by ``setting``."""
    if world_size() % size:
        raise UserError(
            f"{setting} is {size}, which does not divide the {world_size()} rank(s) of this run; "
            f"start a multiple of {size} ranks, or give another {setting}"
        )


class Subgroup:
    """The group of ``size`` consecutive ranks that this rank belongs to.

    Making one is a collective of all ranks, not of the group alone.

    Attributes:
        first: the group's first rank.
        rank: this rank's place in the group.
    """

    def __init__(self, size: int, setting: str) -> None:
        check_divides(size, setting)
        self.size = size
        self.first = rank() // size * size
        self.rank = rank() - self.first
        self._setting = setting
        self.timeout = initialise().timeout
        for first in range(0, world_size(), size):
            members = list(range(first, first + size))
            group = dist.new_group(members, timeout=self.timeout, backend="gloo")
            if first == self.first:
                self._group = group

    @property
    def members(self) -> range:
        return range(self.first, self.first + self.size)

    def meet(self, phase: str) -> None:
        """Wait for the group's ranks; the error names who does not come: see `barrier`."""
        barrier(phase, members=self.members)

    def gather_json(self, value: Any) -> list[Any]:
        """One JSON-able value of each of the group's ranks, in rank order."""
        return all_gather_json(value, self._group)

    def shared_memory(self, nbytes: int) -> Tensor:
        """``[nbytes]`` uint8, zero at first, that all ranks of the group read and write.

        Raises:
            UserError: the ranks are on several hosts.
        """
        pages, missing = share_memory(nbytes, self.rank == 0, self.gather_json)
        if pages is None or missing:
            away = ", ".join(str(self.first + at) for at in missing)
            raise UserError(
                f"{self._setting} is {self.size}, but of the ranks {self.first} to "
                f"{self.members[-1]}, which would work together, {away} cannot reach the memory "
                f"of rank {self.first}: they must be on one host; give a {self._setting} that "
                "divides the ranks of each host"
            )
        return torch.frombuffer(pages, dtype=torch.uint8)
