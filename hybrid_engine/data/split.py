"""Which rows each step trains on and which it keeps for evaluation.

Every row gets three random numbers from a hash of (seed, content). One places it in a step, one
says whether it is held out, one orders it wherever some rows must be chosen. Nothing depends on a
row's position or on its neighbours, so a source may grow or be reordered and its rows stay where
they were; equal rows always stay together, so a duplicate never stands on both sides.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from hybrid_engine.data.records import STEPS, Kind

STEP, HELDOUT, ORDER = range(3)  # columns of the keys
WEIGHTLESS = ("label", "margin")  # a row keeps its place when its judgement is corrected


def content_key(fields: dict[str, Any], kind: Kind, seed: int) -> bytes:
    """24 bytes: three 64-bit random numbers, the same for equal content and seed."""
    columns = (*kind.required, *kind.optional)
    content = {name: fields[name] for name in columns if name in fields and name not in WEIGHTLESS}
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=24, key=str(seed).encode()).digest()


def keys_array(keys: list[bytes]) -> np.ndarray:
    """``[rows, 3]`` uniform numbers in [0, 1)."""
    words = np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 3)
    return (words >> np.uint64(11)) * 2.0**-53


def step_rows(keys: np.ndarray, kind: Kind, shares: tuple[float, ...], step: str) -> np.ndarray:
    """Indices of the rows that belong to ``step``.

    Shares of steps that this kind of row cannot serve go to the others in proportion, so a file of
    bare prompts is used by step 3 as a whole.
    """
    usable = [
        share if name in kind.steps else 0.0 for share, name in zip(shares, STEPS, strict=True)
    ]
    if not sum(usable):
        return np.empty(0, dtype=np.int64)
    edges = np.cumsum([0.0, *usable])
    edges /= edges[-1]
    index = STEPS.index(step)
    inside = (keys[:, STEP] >= edges[index]) & (keys[:, STEP] < edges[index + 1])
    return np.flatnonzero(inside)


def split_heldout(keys: np.ndarray, fraction: float) -> np.ndarray:
    """Mask of the held-out rows.

    Where chance gives a small source none of one sort, the row nearest to it changes sides; a
    single row is trained on.
    """
    numbers = keys[:, HELDOUT]
    chosen = numbers < fraction
    if len(keys) > 1 and not chosen.any():
        chosen[np.argmin(numbers)] = True
    elif len(keys) > 0 and chosen.all():
        chosen[np.argmax(numbers)] = False
    return chosen


def first_by_order(keys: np.ndarray, count: int) -> np.ndarray:
    """Indices of ``count`` rows in random order: a sample that changes as little as possible when
    rows are added.
    """
    return np.argsort(keys[:, ORDER], kind="stable")[:count]


def blend_counts(available: list[int], weights: tuple[float, ...]) -> list[int]:
    """Rows to take from each source: the largest numbers in the proportion of ``weights`` that need
    no row twice.

    Sources without rows for the step take no part.
    """
    if not weights:
        return available
    scale = min(
        (rows / weight for rows, weight in zip(available, weights, strict=True) if rows),
        default=0.0,
    )
    return [
        min(rows, round(scale * weight)) for rows, weight in zip(available, weights, strict=True)
    ]
