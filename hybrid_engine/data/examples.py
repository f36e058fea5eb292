"""What each step takes from a row."""

from __future__ import annotations

from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from hybrid_engine.config import DataConfig
from hybrid_engine.data.encode import Encoder, first_words
from hybrid_engine.data.messages import Messages, Text, split_conversation
from hybrid_engine.data.records import Record
from hybrid_engine.data.schema import (
    ANSWER,
    CONVERSATION,
    LABELLED_ANSWER,
    LABELLED_TEXT,
    PREFERENCE,
    TEXT,
)
from hybrid_engine.data.turns import Span, up_to_the_last_answer


@dataclass(frozen=True)
class SFTExample:
    """A prompt and its answer, or a conversation with several.

    Only the tokens in ``spans``, places ``[begin, end)`` in ascending order, carry loss. The first
    token is in none of them.
    """

    tokens: list[int]
    spans: tuple[Span, ...]

    @property
    def prompt_length(self) -> int:
        """Tokens before the first answer."""
        return self.spans[0][0]

    @property
    def num_targets(self) -> int:
        return sum(end - begin for begin, end in self.spans)


@dataclass(frozen=True)
class PairExample:
    """A better and a worse sequence.

    ``prompt_length`` is 0 when their prompts differ (labelled texts).
    """

    chosen: list[int]
    rejected: list[int]
    prompt_length: int
    margin: float


@dataclass(frozen=True)
class PromptExample:
    """A prompt to answer; ``extra`` holds the row's other columns, for the rewards."""

    tokens: list[int]
    text: str
    extra: dict[str, Any]


class NotForThisStep(Exception):
    """A sound row that this step cannot use; the text is the reason under which it is counted."""


class ExampleMaker:
    """Turns records into examples, or says why a row is no use to the step.

    A conversation teaches all its assistant turns. Of a preference, step 1 learns the chosen
    answer; of labelled answers, those labelled 1; of labelled texts, all (there the label is a
    property to learn).
    """

    def __init__(self, encoder: Encoder, config: DataConfig) -> None:
        self.encoder = encoder
        self.words = config.prompt_words
        self.max_prompt = config.max_prompt_tokens

    def sft(self, record: Record) -> SFTExample:
        if record.kind is CONVERSATION:
            return SFTExample(*self.encoder.conversation(taught(record)))
        prompt, (answer,) = self._parts(record, "sft")
        tokens, length = self.encoder.sequence(prompt, answer)
        return SFTExample(tokens, ((max(length, 1), len(tokens)),))

    def pair(self, record: Record) -> PairExample:
        """Of a preference row."""
        prompt, answers = self._parts(record, "reward")
        (chosen, length), (rejected, _) = (
            self.encoder.sequence(prompt, answer) for answer in answers
        )
        return PairExample(chosen, rejected, length, float(record.fields.get("margin") or 0.0))

    def labelled_pair(self, good: Record, bad: Record) -> PairExample:
        """Of a row labelled 1 and a row labelled 0."""
        sides = []
        for record in (good, bad):
            prompt, (answer,) = self._parts(record, "reward")
            sides.append(self.encoder.sequence(prompt, answer))
        (chosen, length), (rejected, other) = sides
        shared = length == other and chosen[:length] == rejected[:length]
        return PairExample(chosen, rejected, length if shared else 0, 0.0)

    def prompt(self, record: Record) -> PromptExample:
        prompt, _ = self._parts(record, "rlhf")
        text, tokens = self.encoder.prompt(prompt)
        extra = {name: value for name, value in record.fields.items() if name != "prompt"}
        return PromptExample(tokens, text, extra)

    def check(self, record: Record, step: str) -> None:
        """Raise NotForThisStep or BadRow where making the example would fail; tokenises no more
        than the prompt, where that is enough to know.
        """
        if record.kind is CONVERSATION and step == "sft":
            self._check_prompt(self.encoder.opening_length(taught(record)))
            return
        prompt, answers = self._parts(record, step)
        text, tokens = self.encoder.prompt(prompt)
        self._check_prompt(len(tokens))
        texts = [self.encoder.answer_text(text, prompt, answer) for answer in answers]
        if len(texts) == 2 and self._equal_when_cut(texts, self.encoder.max_length - len(tokens)):
            raise NotForThisStep("answers are equal up to data.max_length")

    def _check_prompt(self, length: int) -> None:
        if length > self.max_prompt:
            raise NotForThisStep(f"prompt longer than {self.max_prompt} tokens")

    def _equal_when_cut(self, texts: list[str], budget: int) -> bool:
        """A character is at most four tokens, so answers that differ early need no tokens to tell
        them apart.
        """
        if 4 * len(commonprefix(texts)) < budget:
            return False
        first, second = (self.encoder.answer_tokens(text)[:budget] for text in texts)
        return first == second

    def _parts(self, record: Record, step: str) -> tuple[Text, tuple[Text, ...]]:
        """(prompt, the answers that the step reads)."""
        fields, kind = record.fields, record.kind
        if kind is PREFERENCE:
            return self._preference_parts(fields, step)
        if kind is LABELLED_ANSWER and step == "sft" and fields["label"] == 0:
            raise NotForThisStep("answer labelled 0")
        prompt, answer = self._prompt_and_answer(record)
        if kind is CONVERSATION and step == "rlhf" and not prompt:
            raise NotForThisStep("no prompt")
        if kind in (TEXT, LABELLED_TEXT) and step != "reward":
            if not answer:
                raise NotForThisStep(f"no more than {self.words} words (data.prompt_words)")
            if not prompt and step == "rlhf":
                raise NotForThisStep("no prompt, because data.prompt_words is 0; give 1 or more")
        return prompt, () if step == "rlhf" else (answer,)

    def _preference_parts(self, fields: dict[str, Any], step: str) -> tuple[Text, tuple[Text, ...]]:
        if step == "rlhf" and not fields["prompt"]:
            raise NotForThisStep("no prompt")
        answers = {"sft": ("chosen",), "reward": ("chosen", "rejected"), "rlhf": ()}[step]
        return fields["prompt"], tuple(fields[name] for name in answers)

    def _prompt_and_answer(self, record: Record) -> tuple[Text, Text]:
        fields, kind = record.fields, record.kind
        if kind in (ANSWER, LABELLED_ANSWER):
            return fields["prompt"], fields["completion"]
        if kind is CONVERSATION:
            return split_conversation(fields["messages"])
        if kind in (TEXT, LABELLED_TEXT):
            return first_words(fields["text"], self.words)
        return fields["prompt"], ""


def taught(record: Record) -> Messages:
    """A conversation up to its last answer."""
    messages = up_to_the_last_answer(record.fields["messages"])
    if not messages:
        raise NotForThisStep("conversation without an answer by the assistant")
    return messages
