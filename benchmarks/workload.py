"""Seeded prompts and answer lengths, the same for everyone who is compared."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any


def random_prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Token ids without meaning, none of them among the special first hundred."""
    rng = random.Random(seed)
    return [[rng.randrange(100, vocab_size) for _ in range(length)] for _ in range(count)]


def word_prompts(tokenizer: Any, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Prompts of whole words of one token each, so that their text tokenises to them again."""
    rng = random.Random(seed)
    words = [token for token in range(1000, 20000) if _is_word(tokenizer.decode([token]))]
    prompts = [[rng.choice(words) for _ in range(length)] for length in lengths]
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == prompts
    return prompts


def _is_word(text: str) -> bool:
    return len(text) > 3 and text[0] == " " and text[1:].isascii() and text[1:].islower()


def ragged_lengths(count: int, shortest: int, longest: int, seed: int = 0) -> list[int]:
    """Evenly spread, both ends included, in random order."""
    span = longest - shortest
    lengths = [shortest + round(i * span / (count - 1)) for i in range(count)]
    random.Random(seed).shuffle(lengths)
    return lengths


def heavy_tailed_lengths(count: int, mean: int, longest: int, seed: int = 0) -> list[int]:
    """Answer lengths as chat has them: most are short, a few reach the limit.

    Quantiles of a log-normal with sigma 1, cut at `longest` (which one reaches), scaled so that the
    mean is exact.
    """
    shape = [math.exp(NormalDist().inv_cdf((i + 0.5) / count)) for i in range(count - 1)]

    def scaled(scale: float) -> list[int]:
        return [*(min(longest, max(1, round(scale * value))) for value in shape), longest]

    low, high = 0.0, float(longest)
    for _ in range(60):  # bisection
        middle = (low + high) / 2
        low, high = (middle, high) if sum(scaled(middle)) < mean * count else (low, middle)
    lengths = scaled(low)
    lengths[count // 2] += mean * count - sum(lengths)  # what rounding left
    random.Random(seed).shuffle(lengths)
    return lengths
