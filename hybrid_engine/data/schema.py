"""Which columns make which kind of row, and the check that turns a raw row into a record."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hybrid_engine.data.messages import (
    check_answer,
    check_messages,
    check_prompt,
    check_text,
    check_text_or_messages,
    harmonise,
    implicit_prompt,
)
from hybrid_engine.data.records import BadRow, Kind
from hybrid_engine.data.textfiles import describe
from hybrid_engine.errors import UserError

LABELS = {"0": 0, "1": 1, "false": 0, "true": 1}

PREFERENCE = Kind("preference", ("chosen", "rejected"), ("prompt", "margin"))
LABELLED_ANSWER = Kind("labelled answer", ("prompt", "completion", "label"))
ANSWER = Kind("answer", ("prompt", "completion"), steps=("sft", "rlhf"))
CONVERSATION = Kind("conversation", ("messages",), steps=("sft", "rlhf"))
LABELLED_TEXT = Kind("labelled text", ("text", "label"))
TEXT = Kind("text", ("text",), steps=("sft", "rlhf"))
PROMPT = Kind("prompt", ("prompt",), steps=("rlhf",))

# The first kind whose columns are all there wins, so that rows with several forms take the richest.
KINDS = (PREFERENCE, LABELLED_ANSWER, ANSWER, CONVERSATION, LABELLED_TEXT, TEXT, PROMPT)
COLUMNS = ("text", "messages", "prompt", "completion", "chosen", "rejected", "label", "margin")


def parse_columns(entries: Sequence[str]) -> dict[str, str]:
    """``("question=prompt", ...)`` to ``{"question": "prompt"}``; else raises UserError."""
    mapping: dict[str, str] = {}
    for entry in entries:
        theirs, separator, ours = entry.partition("=")
        if not (theirs and separator and ours in COLUMNS):
            raise UserError(
                f"data.columns: {entry!r} is not THEIRS=OURS with OURS one of {', '.join(COLUMNS)}"
            )
        if ours in mapping.values():
            raise UserError(f"data.columns: two columns are mapped to {ours!r}; keep one")
        mapping[theirs] = ours
    return mapping


def rename(row: dict[str, Any], mapping: dict[str, str]) -> dict[str, Any]:
    """The row under our names. A mapped column displaces one that had our name already."""
    mapped = {mapping[name]: value for name, value in row.items() if name in mapping}
    return {name: value for name, value in row.items() if name not in mapping} | mapped


def kind_of(columns: Iterable[str]) -> Kind:
    """The kind that a row with these columns has; raises BadRow when there is none."""
    present = set(columns)
    for kind in KINDS:
        if present.issuperset(kind.required):
            return kind
    forms = "; ".join(" + ".join(kind.required) for kind in reversed(KINDS))
    raise BadRow(
        f"no usable columns (found {listed(present)}); give {forms}, or map yours with "
        "data.columns THEIRS=OURS"
    )


def listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(map(str, names))) or "none"


def check_label(value: Any, column: str) -> int:
    label = LABELS.get(str(value).strip().lower()) if isinstance(value, str | int | bool) else None
    if isinstance(value, float) and value in (0.0, 1.0):
        label = int(value)
    if label is None:
        raise BadRow(f"column {column!r} is {value!r}; give 1 (good) or 0 (bad)")
    return label


def check_margin(value: Any, column: str) -> float:
    try:
        margin = float(value)
    except (TypeError, ValueError):
        raise BadRow(f"column {column!r} is {describe(value)}; give a number") from None
    if not math.isfinite(margin):
        raise BadRow(f"column {column!r} is {margin}; give a finite number")
    return margin


def check_conversation(value: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise BadRow(f"column {column!r} is {describe(value)}; give a list of messages")
    return check_messages(value, column)


CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "text": check_text,
    "messages": check_conversation,
    "label": check_label,
    "margin": check_margin,
}  # the other columns hold text or messages


def check_row(row: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """The row's fields, checked and normalised.

    ``label`` becomes 0 or 1, ``margin`` a float; prompt and answers of one row are all strings or
    all messages; a preference always has its prompt. Columns outside the kind are kept as they are.
    Raises BadRow.
    """
    fields = dict(row)
    for column in kind.required:
        if row.get(column) is None:
            found = listed(name for name, value in row.items() if value is not None)
            raise BadRow(f"column {column!r} is missing (found {found}); give it or remove the row")
    for column in (*kind.required, *kind.optional):
        if row.get(column) is not None:
            fields[column] = CHECKS.get(column, check_text_or_messages)(row[column], column)
    if kind is PREFERENCE:
        fields |= check_preference(fields)
    elif "completion" in kind.required:
        fields["prompt"], fields["completion"] = harmonise(fields["prompt"], fields["completion"])
        check_answer(fields["prompt"], fields["completion"], "completion")
    elif kind is PROMPT:
        check_prompt(fields["prompt"])
    return fields


def check_preference(fields: dict[str, Any]) -> dict[str, Any]:
    chosen, rejected = fields["chosen"], fields["rejected"]
    if type(chosen) is not type(rejected):
        raise BadRow(
            f"'chosen' is {describe(chosen)} and 'rejected' is {describe(rejected)}; give both "
            "in one form"
        )
    if chosen == rejected:
        raise BadRow("'chosen' and 'rejected' are equal; remove the row")
    if fields.get("prompt") is None:
        prompt, chosen, rejected = implicit_prompt(chosen, rejected)
    else:
        prompt, chosen, rejected = harmonise(fields["prompt"], chosen, rejected)
        chosen, rejected = (without_prompt(prompt, answer) for answer in (chosen, rejected))
    for column, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer:
            raise BadRow(f"column {column!r} holds nothing after the prompt; give an answer")
        check_answer(prompt, answer, column)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def without_prompt(prompt: Any, answer: Any) -> Any:
    """Many sets of conversations repeat the prompt's turns at the head of each answer."""
    repeats = isinstance(answer, list) and prompt and answer[: len(prompt)] == prompt
    return answer[len(prompt) :] if repeats else answer
