"""From text or turns to tokens: what the model reads, and what it learns to write.

Prompt and answer are tokenised apart and laid end to end, so a prompt has the same tokens whether
it stands alone (a rollout) or before its answer (training). A complete answer ends with an
end-of-sequence token; a cut one does not. A conversation is a prompt and an answer several times
over, unless its chat template marks what the assistant generates: then it is tokenised as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jinja2

from hybrid_engine.config import DataConfig
from hybrid_engine.data.messages import Messages, Text, as_assistant, as_user
from hybrid_engine.data.records import BadRow
from hybrid_engine.data.turns import (
    Span,
    cut_into_turns,
    cut_spans,
    marked_spans,
    marks_generation,
    not_a_beginning,
)
from hybrid_engine.errors import UserError

OPEN = "Assistant:"  # what a prompt of plain paragraphs ends with


class Encoder:
    """Tokenises prompts and answers as ``data.chat_template`` says.

    auto: turns go through the tokenizer's chat template, strings stay as they are. always: strings
    are wrapped into a user and an assistant turn. never: turns become plain text, ``User: ...`` and
    ``Assistant: ...`` with an empty line between them.
    """

    def __init__(
        self, tokenizer: Any, config: DataConfig, eos_token_id: int | Sequence[int]
    ) -> None:
        self.tokenizer = tokenizer
        self.style = config.chat_template
        self.max_length = config.max_length
        self.ends = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
        self._end_texts = [text for text in map(tokenizer.decode, self.ends) if text.strip()]
        self._lead = self._leading_tokens()
        self._marked = self.style != "never" and marks_generation(tokenizer.chat_template)
        if self.style == "always":
            self._need_template("data.chat_template is 'always'")

    def prompt(self, prompt: Text) -> tuple[str, list[int]]:
        """(text, tokens) of a prompt.

        An empty one is the start token alone, so there is always a token to go on from.
        """
        styled, _ = self._in_style(prompt, None)
        if isinstance(styled, str):
            return styled, self._lead + self._tokenize(styled) if styled else self._start()
        text = self._render(styled, generate=True)
        return text, self._tokenize(text)

    def sequence(self, prompt: Text, answer: Text) -> tuple[list[int], int]:
        """(tokens of prompt + answer, length of the prompt), cut after ``max_length`` tokens."""
        text, tokens = self.prompt(prompt)
        length = len(tokens)
        tokens = tokens + self.answer_tokens(self.answer_text(text, prompt, answer))
        return tokens[: self.max_length], length

    def conversation(self, messages: Messages) -> tuple[list[int], tuple[Span, ...]]:
        """(tokens, the assistant's parts of them) of a conversation that ends with the assistant,
        cut after ``max_length`` tokens.

        Raises BadRow when the template does not show where a turn begins and ends.
        """
        tokens, spans = self._turns(messages)
        return cut_spans(tokens, spans, self.max_length)

    def opening_length(self, messages: Messages) -> int:
        """Tokens before the assistant's first part; raises BadRow as :meth:`conversation` does."""
        if self._marked:
            return self._marked_turns(messages)[1][0][0]
        context, _ = cut_into_turns(messages, self._text, self._end_texts)[0]
        return len(self._conversation_lead() + self._tokenize(context))

    def answer_text(self, prompt_text: str, prompt: Text, answer: Text) -> str:
        """What follows the prompt's text.

        Raises BadRow when the template renders the prompt differently before an answer.
        """
        turns, styled = self._in_style(prompt, answer)
        if isinstance(styled, str):
            return styled
        whole = self._render(turns + styled, generate=False)
        if not whole.startswith(prompt_text):
            raise not_a_beginning()
        return whole[len(prompt_text) :]

    def answer_tokens(self, text: str) -> list[int]:
        """Tokens of a complete answer, which ends with exactly one end token.

        Templates put white space after theirs; plain text has none.
        """
        return self._ended(self._tokenize(text))

    def end(self) -> int:
        """The token that ends an answer; raises UserError where the model declares none."""
        if not self.ends:
            raise UserError(
                "neither the tokenizer nor the model declares an end token, so no answer could "
                "end; set eos_token in its tokenizer_config.json or eos_token_id in its "
                "generation_config.json"
            )
        return self.ends[0]

    def _ended(self, tokens: list[int]) -> list[int]:
        last = max((at for at, token in enumerate(tokens) if token in self.ends), default=-1)
        if last >= 0 and not self.tokenizer.decode(tokens[last + 1 :]).strip():
            return tokens[: last + 1]
        return [*tokens, self.end()]

    def _start(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return self._lead or [self.end() if bos is None else bos]

    def _conversation_lead(self) -> list[int]:
        """What precedes the text of a conversation: templates write their own start."""
        return list(self._lead) if self.style == "never" else []

    def _turns(self, messages: Messages) -> tuple[list[int], list[Span]]:
        if self._marked:
            return self._marked_turns(messages)
        tokens, spans = self._conversation_lead(), []
        for context, answer in cut_into_turns(messages, self._text, self._end_texts):
            tokens += self._tokenize(context)
            begin = len(tokens)
            tokens += self._tokenize(answer)
            spans.append((begin, len(tokens)))
        return self._end_last(tokens, spans)

    def _marked_turns(self, messages: Messages) -> tuple[list[int], list[Span]]:
        encoded = self._apply_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        tokens = encoded["input_ids"]
        spans = marked_spans(encoded["assistant_masks"], tokens, self.ends)
        if not spans:
            raise BadRow(
                "the chat template marks no part of this conversation as generated; mend its "
                "{% generation %} tags or set data.chat_template to 'never'"
            )
        return self._end_last(tokens, spans)

    def _end_last(self, tokens: list[int], spans: list[Span]) -> tuple[list[int], list[Span]]:
        begin, end = spans[-1]
        tokens = tokens[:begin] + self._ended(tokens[begin:end])
        return tokens, [*spans[:-1], (begin, len(tokens))]

    def _text(self, messages: Messages, generate: bool) -> str:
        if self.style != "never":
            return self._render(messages, generate)
        return plain_prompt(messages) if generate else plain(messages)

    def _in_style(self, prompt: Text, answer: Text | None) -> tuple[Any, Any]:
        """Both parts as strings or both as turns, whichever this style tokenises."""
        if self.style == "always" and isinstance(prompt, str) and prompt:
            return as_user(prompt), None if answer is None else as_assistant(answer)
        if self.style == "never" and isinstance(prompt, list):
            reply = None if answer is None else plain(as_assistant(answer)).removeprefix(OPEN)
            return plain_prompt(prompt), reply
        return prompt, answer

    def _render(self, messages: Messages, generate: bool) -> str:
        return self._apply_template(messages, tokenize=False, add_generation_prompt=generate)

    def _apply_template(self, messages: Messages, **options: Any) -> Any:
        self._need_template("the row holds messages")
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise BadRow(
                f"the tokenizer's chat template refuses these messages ({error}); "
                "mend the row or set data.chat_template to 'never'"
            ) from None

    def _need_template(self, reason: str) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                f"{reason}, but the tokenizer has no chat template; "
                "set data.chat_template to 'never' or take a model that has one"
            )

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _leading_tokens(self) -> list[int]:
        """What the tokenizer itself puts before plain text: Llama's and OPT's BOS.

        A rendered template has its own.
        """
        probe = "a"
        bare = self._tokenize(probe)
        dressed = self.tokenizer(probe, verbose=False)["input_ids"]
        for start in range(len(dressed) - len(bare) + 1):
            if dressed[start : start + len(bare)] == bare:
                return dressed[:start]
        return []


def plain(messages: Messages) -> str:
    """``Role: content`` paragraphs."""
    return "\n\n".join(
        f"{message['role'].capitalize()}: {message['content']}" for message in messages
    )


def plain_prompt(messages: Messages) -> str:
    """The same, with the assistant's turn to come."""
    return plain(messages) + ("\n\n" if messages else "") + OPEN


def first_words(text: str, count: int) -> tuple[str, str]:
    """(the first ``count`` words, the rest with its leading space, empty when there is none)."""
    if count == 0:
        return "", text
    words = list(re.finditer(r"\S+", text))
    cut = words[min(count, len(words)) - 1].end()
    return text[:cut], text[cut:] if len(words) > count else ""
