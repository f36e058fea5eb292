"""From text or turns to tokens: what the model reads, and what it learns to write.

Prompt and answer are tokenised apart and laid end to end, so a prompt has the same tokens whether
it stands alone (a rollout) or before its answer (training). A complete answer ends with an
end-of-sequence token; a cut one does not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jinja2

from hybrid_engine.config import DataConfig
from hybrid_engine.data.messages import Messages, Text, as_assistant, as_user
from hybrid_engine.data.records import BadRow
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
        self._lead = self._leading_tokens()
        self._start = self._lead or [
            self.ends[0] if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ]
        if self.style == "always":
            self._need_template("data.chat_template is 'always'")

    def prompt(self, prompt: Text) -> tuple[str, list[int]]:
        """(text, tokens) of a prompt.

        An empty one is the start token alone, so there is always a token to go on from.
        """
        styled, _ = self._in_style(prompt, None)
        if isinstance(styled, str):
            return styled, self._lead + self._tokenize(styled) if styled else list(self._start)
        text = self._render(styled, generate=True)
        return text, self._tokenize(text)

    def sequence(self, prompt: Text, answer: Text) -> tuple[list[int], int]:
        """(tokens of prompt + answer, length of the prompt), cut after ``max_length`` tokens."""
        text, tokens = self.prompt(prompt)
        length = len(tokens)
        tokens = tokens + self.answer_tokens(self.answer_text(text, prompt, answer))
        return tokens[: self.max_length], length

    def answer_text(self, prompt_text: str, prompt: Text, answer: Text) -> str:
        """What follows the prompt's text.

        Raises BadRow when the template renders the prompt differently before an answer.
        """
        turns, styled = self._in_style(prompt, answer)
        if isinstance(styled, str):
            return styled
        whole = self._render(turns + styled, generate=False)
        if not whole.startswith(prompt_text):
            raise BadRow(
                "the chat template does not render the prompt as the beginning of prompt + answer; "
                "set data.chat_template to 'never', or give the tokenizer another template"
            )
        return whole[len(prompt_text) :]

    def answer_tokens(self, text: str) -> list[int]:
        """Tokens of a complete answer, which ends with exactly one end token.

        Templates put white space after theirs; plain text has none.
        """
        tokens = self._tokenize(text)
        last = max((at for at, token in enumerate(tokens) if token in self.ends), default=-1)
        if last >= 0 and not self.tokenizer.decode(tokens[last + 1 :]).strip():
            return tokens[: last + 1]
        return [*tokens, self.ends[0]]

    def _in_style(self, prompt: Text, answer: Text | None) -> tuple[Any, Any]:
        """Both parts as strings or both as turns, whichever this style tokenises."""
        if self.style == "always" and isinstance(prompt, str) and prompt:
            return as_user(prompt), None if answer is None else as_assistant(answer)
        if self.style == "never" and isinstance(prompt, list):
            opening = plain(prompt) + ("\n\n" if prompt else "") + OPEN
            reply = None if answer is None else plain(as_assistant(answer)).removeprefix(OPEN)
            return opening, reply
        return prompt, answer

    def _render(self, messages: Messages, generate: bool) -> str:
        self._need_template("the row holds messages")
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate
            )
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


def first_words(text: str, count: int) -> tuple[str, str]:
    """(the first ``count`` words, the rest with its leading space, empty when there is none)."""
    if count == 0:
        return "", text
    words = list(re.finditer(r"\S+", text))
    cut = words[min(count, len(words)) - 1].end()
    return text[:cut], text[cut:] if len(words) > count else ""
