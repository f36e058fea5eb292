"""Memory that is given back and taken again without changing its address."""

from __future__ import annotations

import mmap

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
