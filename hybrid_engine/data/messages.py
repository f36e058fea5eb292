"""Conversations, checked and cut into prompt and answer: ``[{"role": ..., "content": ...}]``."""

from __future__ import annotations

from typing import Any

from hybrid_engine.data.records import BadRow
from hybrid_engine.data.textfiles import describe

Message = dict[str, Any]
Messages = list[Message]
Text = str | Messages  # what a column may hold: plain text, or turns

ROLES = ("system", "developer", "user", "assistant", "tool")
# Anthropic's plain-text dialogues, where prompt and answer are one string.
HH_MARKER = "\n\nAssistant:"


def check_text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"column {column!r} is {describe(value)}; give text")
    if not value.strip():
        raise BadRow(f"column {column!r} is empty; give text or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            f"column {column!r} holds half a surrogate pair (character {error.start}), which no "
            "text has; mend it"
        ) from None
    return value


def check_messages(value: list[Any], column: str) -> Messages:
    if not value:
        raise BadRow(f"column {column!r} is an empty list; give at least one message")
    for index, message in enumerate(value):
        place = f"{column}[{index}]"
        if not isinstance(message, dict):
            raise BadRow(
                f"{place} is {describe(message)}; give an object with 'role' and 'content'"
            )
        missing = [key for key in ("role", "content") if key not in message]
        if missing:
            found = ", ".join(map(repr, message)) or "nothing"
            raise BadRow(
                f"{place} has no {missing[0]!r} (found {found}); give 'role' and 'content'"
            )
        if message["role"] not in ROLES:
            raise BadRow(
                f"{place} has the unknown role {message['role']!r}; use one of {', '.join(ROLES)}"
            )
        check_text(message["content"], f"{place}.content")
    return value


def check_text_or_messages(value: Any, column: str) -> Text:
    if isinstance(value, list):
        return check_messages(value, column)
    if not isinstance(value, str):
        raise BadRow(f"column {column!r} is {describe(value)}; give text or a list of messages")
    return check_text(value, column)


def as_user(text: Text) -> Messages:
    return [{"role": "user", "content": text}] if isinstance(text, str) else text


def as_assistant(text: Text) -> Messages:
    return [{"role": "assistant", "content": text}] if isinstance(text, str) else text


def harmonise(prompt: Text, *answers: Text) -> tuple[Text, ...]:
    """Strings stay strings; as soon as one part is a conversation, all of them become one."""
    if all(isinstance(part, str) for part in (prompt, *answers)):
        return prompt, *answers
    turns = [] if prompt == "" else as_user(prompt)
    return turns, *(as_assistant(answer) for answer in answers)


def check_answer(prompt: Text, answer: Text, column: str) -> None:
    """An answer in turns ends with the assistant, and so does not a prompt."""
    if isinstance(answer, list) and answer[-1]["role"] != "assistant":
        raise BadRow(
            f"column {column!r} ends with role {answer[-1]['role']!r}; an answer ends with "
            "'assistant'"
        )
    check_prompt(prompt)


def check_prompt(prompt: Text) -> None:
    if isinstance(prompt, list) and prompt and prompt[-1]["role"] == "assistant":
        raise BadRow(
            "column 'prompt' ends with role 'assistant'; move that turn to the answer's column"
        )


def split_conversation(messages: Messages) -> tuple[Messages, Messages]:
    """(prompt, answer): the answer is the last assistant turn, or empty when the conversation
    awaits one.

    Only a conversation that ends with the user (or a tool) is waiting; its earlier answers are
    context.
    """
    if messages[-1]["role"] != "assistant":
        return messages, []
    return messages[:-1], messages[-1:]


def implicit_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """(prompt, chosen, rejected) of a pair that carries its prompt inside both answers.

    Conversations share their first turns. Two strings share everything up to the last
    ``Assistant:`` they have in common, as in Anthropic's HH; other strings have an empty prompt.
    """
    if isinstance(chosen, list):
        shared = 0
        shorter = min(len(chosen), len(rejected))
        while shared < shorter and chosen[shared] == rejected[shared]:
            shared += 1
        if shared == shorter:
            raise BadRow(
                "'chosen' continues 'rejected' or the other way round; each must end with its "
                "own answer"
            )
        return chosen[:shared], chosen[shared:], rejected[shared:]
    shared = 0
    while chosen[shared : shared + 1] == rejected[shared : shared + 1] != "":
        shared += 1
    marker = chosen.rfind(HH_MARKER, 0, shared)
    cut = marker + len(HH_MARKER) if marker >= 0 else 0
    return chosen[:cut], chosen[cut:], rejected[cut:]
