"""Text from tokens as they come, fit to be printed at once."""

from __future__ import annotations

from collections.abc import Callable


class TextStream:
    """Text of a growing list of tokens, in pieces that are safe to print.

    A character that needs several tokens comes as a whole. What follows `stop` is cut off, and text
    that may be its beginning is held back until it is clear.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: str = "") -> None:
        self._decode = decode
        self._stop = stop
        self._tokens: list[int] = []
        self._context = (
            0  # decoding starts here: the first piece of some tokenizers loses its space
        )
        self._read = 0  # tokens before this one are in the text
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that `token` completes."""
        self._tokens.append(token)
        known = self._decode(self._tokens[self._context : self._read])
        text = self._decode(self._tokens[self._context :])
        if text.endswith("\ufffd") or len(text) <= len(known):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return self._release(text[len(known) :])

    def finish(self) -> str:
        """The text held back; half a character becomes U+FFFD."""
        known = self._decode(self._tokens[self._context : self._read])
        rest = self._held + self._decode(self._tokens[self._context :])[len(known) :]
        self._held, self._read = "", len(self._tokens)
        return self._emit("" if self.stopped else rest)

    def _release(self, text: str) -> str:
        if self.stopped or not self._stop:
            return self._emit("" if self.stopped else text)
        text, found, _ = (self._held + text).partition(self._stop)
        self.stopped = bool(found)
        keep = 0 if found else overlap(text, self._stop)
        self._held = text[len(text) - keep :]
        return self._emit(text[: len(text) - keep])

    def _emit(self, text: str) -> str:
        self.text += text
        return text


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next(
        (
            size
            for size in range(min(len(text), len(stop) - 1), 0, -1)
            if text.endswith(stop[:size])
        ),
        0,
    )
