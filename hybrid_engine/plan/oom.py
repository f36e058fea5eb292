"""Knowing an allocation that failed when one sees it."""

from __future__ import annotations

import torch

# torch's allocator for the CPU, gloo, and mmap have no type of their own for it.
_WORDS = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, in Python, in torch on either device, or in the native library."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(w in str(error) for w in _WORDS)
