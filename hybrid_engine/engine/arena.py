"""Memory that is given back and taken again without changing its address."""

from __future__ import annotations

import mmap
import threading

import torch
from torch import Tensor


class Arena:
    """One range of addresses for ``nbytes`` bytes, reserved once.

    Pages exist from their first write until :meth:`release`, which returns them to the operating
    system: whoever needs memory in between, training for example, has it. Pointers into the arena
    stay valid all along; what they point at is zero after a release.
    """

    def __init__(self, nbytes: int) -> None:
        # Private: shared pages would survive MADV_DONTNEED.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._pages = mmap.mmap(-1, max(nbytes, 1), flags=flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._pages.madvise(mmap.MADV_HUGEPAGE)  # fewer page faults after every release
        self.storage: Tensor = torch.frombuffer(self._pages, dtype=torch.uint8)[:nbytes]

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes

    def release(self) -> None:
        """Give the memory back; the contents are lost."""
        self._pages.madvise(mmap.MADV_DONTNEED)


class DeviceArena:
    """The same on a GPU, from torch's allocator, which lends the memory to others in between. So
    the address is fixed from the first use until :meth:`release`: for one generation phase.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = nbytes
        self._device = device
        self._storage: Tensor | None = None
        self._first_use = threading.Lock()

    @property
    def storage(self) -> Tensor:
        with self._first_use:
            if self._storage is None:
                self._storage = torch.empty(self.nbytes, dtype=torch.uint8, device=self._device)
            return self._storage

    def release(self) -> None:
        """Give the memory back; the contents are lost."""
        self._storage = None


def arena_on(device: torch.device, nbytes: int) -> Arena | DeviceArena:
    return Arena(nbytes) if device.type == "cpu" else DeviceArena(nbytes, device)
