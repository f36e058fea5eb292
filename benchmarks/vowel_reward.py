"""A reward that needs no model, called by us and by TRL alike: the share of vowels."""

from __future__ import annotations

from typing import Any


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]
