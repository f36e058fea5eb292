"""Which parts of a conversation are the assistant's.

A chat template that marks what the assistant generates (``{% generation %}``) says it itself;
elsewhere a turn is what the whole conversation has after the conversation up to that turn, rendered
as a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from hybrid_engine.data.messages import Messages
from hybrid_engine.data.records import BadRow

Span = tuple[int, int]  # token places [begin, end)
Render = Callable[[Messages, bool], str]  # (messages, whether the assistant is to go on) -> text

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def marks_generation(template: str | dict[str, str] | None) -> bool:
    """Of a tokenizer's ``chat_template``; of several, the one called 'default' is used."""
    text = template.get("default") if isinstance(template, dict) else template
    return GENERATION_TAG.search(text or "") is not None


def marked_spans(mask: Sequence[int], tokens: Sequence[int], ends: Sequence[int]) -> list[Span]:
    """The runs of ones in an assistant mask, each with the end token that follows it.

    Templates differ in whether their tags enclose the end token; a model must learn to write it.
    """
    spans: list[Span] = []
    at = 0
    while at < len(mask):
        begin = at
        while at < len(mask) and mask[at]:
            at += 1
        if at > begin:
            at += at < len(tokens) and tokens[at] in ends and tokens[at - 1] not in ends
            spans.append((begin, at))
        else:
            at += 1
    return spans


def cut_into_turns(
    messages: Messages, render: Render, end_texts: Sequence[str]
) -> list[tuple[str, str]]:
    """``(context, answer)`` for each assistant turn; joined, they are the conversation up to the
    end of the last one.

    The answer of a turn reaches up to its end token where the template writes one. Raises BadRow
    for a template that renders the beginning of a conversation differently when more follows, and
    leaves no other sign of where a turn ends.
    """
    whole = render(messages, False)
    places = list(answered(messages))
    openings = [_prefix_length(render(messages[:at], True), whole) for at in places]
    limits = [*openings[1:], len(whole)]
    turns: list[tuple[str, str]] = []
    done = 0
    for at, opening, limit in zip(places, openings, limits, strict=True):
        closed = whole if at == len(messages) - 1 else render(messages[: at + 1], False)
        if whole.startswith(closed):
            closing = opening + _answer_length(whole[opening : len(closed)], end_texts)
        else:  # the last turn is rendered unlike the others, as by templates that drop reasoning
            closing = opening + _first_end(whole[opening:limit], end_texts)
        turns.append((whole[done:opening], whole[opening:closing]))
        done = closing
    return turns


def answered(messages: Messages) -> Iterator[int]:
    """Places of the assistant's turns, but for a first message, which answers nothing."""
    return (at for at, message in enumerate(messages) if at > 0 and message["role"] == "assistant")


def up_to_the_last_answer(messages: Messages) -> Messages:
    """What follows the last assistant turn teaches nothing."""
    return messages[: max(answered(messages), default=-1) + 1]


def not_a_beginning() -> BadRow:
    return BadRow(
        "the chat template does not render the prompt as the beginning of prompt + answer; "
        "set data.chat_template to 'never', or give the tokenizer another template"
    )


def _prefix_length(text: str, whole: str) -> int:
    if not whole.startswith(text):
        raise not_a_beginning()
    return len(text)


def _answer_length(text: str, end_texts: Sequence[str]) -> int:
    """Up to the end token, if only white space follows it; else all."""
    stripped = text.rstrip()
    return len(stripped) if any(map(stripped.endswith, end_texts)) else len(text)


def _first_end(text: str, end_texts: Sequence[str]) -> int:
    found = [text.find(end) + len(end) for end in end_texts if end in text]
    if not found:
        raise not_a_beginning()
    return min(found)


def cut_spans(
    tokens: list[int], spans: Sequence[Span], limit: int
) -> tuple[list[int], tuple[Span, ...]]:
    """(tokens, spans) of at most ``limit`` tokens, which end with the last target.

    Nothing precedes a first token, so it is no target.
    """
    kept = tuple((max(begin, 1), min(end, limit)) for begin, end in spans if begin < limit)
    return tokens[: kept[-1][1]] if kept else tokens[:limit], kept
