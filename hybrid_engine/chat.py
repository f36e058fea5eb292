"""Conversation with a trained model in the terminal: ``python -m hybrid_engine.chat PATH``.

Turns are formatted as in training: by the tokenizer's chat template, or, where it has none, as
``User: ...`` and ``Assistant: ...`` paragraphs with an empty line between them.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hybrid_engine.errors import UserError
from hybrid_engine.report.text import printable
from hybrid_engine.text_stream import TextStream

if TYPE_CHECKING:
    from hybrid_engine.engine import HybridEngine, SamplingParams

Message = dict[str, str]
NEXT_TURN = "\n\nUser:"  # where a model without a template would go on to write the user's part
COMMANDS = (
    "/reset forgets the conversation, /exit leaves, /help shows this. "
    "Ctrl-C stops an answer, Ctrl-D leaves."
)


@dataclass
class Conversation:
    """The turns so far, and the prompt for the next answer."""

    encode: Callable[[list[Message]], list[int]]  # messages, the user's last -> prompt tokens
    room: float  # most tokens of a prompt
    system: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)  # (user, assistant)

    def prompt(self, user: str) -> tuple[list[int], int]:
        """(tokens, turns left out): the system prompt and `user` with as many of the latest whole
        turns as fit.

        Raises:
            UserError: `user` does not fit even without any history.
        """
        for left_out in range(len(self.turns) + 1):
            tokens = self.encode(self._messages(self.turns[left_out:], user))
            if len(tokens) <= self.room:
                return tokens, left_out
        raise UserError(
            f"the message takes {len(tokens)} tokens, but the model's context leaves room for "
            f"{self.room}; shorten it, or lower --max-new-tokens"
        )

    def _messages(self, turns: Sequence[tuple[str, str]], user: str) -> list[Message]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in turns:
            messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        return [*messages, {"role": "user", "content": user}]


class _Stopped(Exception):
    """Ends generation from inside its callback."""


@dataclass
class Speaker:
    """Answers prompts with the engine, writing each piece of text as soon as it is there."""

    engine: HybridEngine
    params: SamplingParams
    stop: str
    write: Callable[[str], None]
    answers: int = 0

    def answer(self, prompt: list[int], trim: bool = True) -> tuple[str, bool]:
        """(the answer, whether Ctrl-C cut it short). `trim` leaves out white space around it."""
        stream = TextStream(self._decode, self.stop)
        started = not trim

        def show(piece: str) -> None:
            nonlocal started
            piece = piece if started else piece.lstrip()
            started = started or piece != ""
            self.write(printable(piece))

        def on_token(sample: int, token: int) -> None:
            show(stream.push(token))
            if stream.stopped:
                raise _Stopped

        interrupted = False
        try:
            # Every answer draws from a random stream of its own, so that asking again may answer
            # differently.
            self.engine.generate(
                [prompt], self.params, sample_ids=[self.answers], on_token=on_token
            )
        except _Stopped:
            pass
        except KeyboardInterrupt:
            interrupted = True
        self.answers += 1
        show(stream.finish())
        return (stream.text.strip() if trim else stream.text), interrupted

    def _decode(self, tokens: list[int]) -> str:
        tokenizer: Any = self.engine.tokenizer  # from_pretrained always has one
        return tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def talk(conversation: Conversation, speaker: Speaker, read: Callable[[], str]) -> None:
    """Reads, answers, remembers; until the end of input or /exit."""
    while True:
        try:
            line = read().strip()
        except EOFError:
            speaker.write("\n")
            return
        except KeyboardInterrupt:
            speaker.write("\n(Ctrl-D or /exit leaves)\n")
            continue
        if line == "/exit":
            return
        if line.startswith("/"):
            speaker.write(command(conversation, line) + "\n")
        elif line:
            try:
                respond(conversation, speaker, line)
            except UserError as error:
                speaker.write(f"{error}\n")


def command(conversation: Conversation, line: str) -> str:
    if line == "/help":
        return COMMANDS
    if line == "/reset":
        conversation.turns.clear()
        return "(a new conversation)"
    return f"unknown command {line}; {COMMANDS}"


def respond(conversation: Conversation, speaker: Speaker, user: str) -> None:
    prompt, left_out = conversation.prompt(user)
    if left_out:
        speaker.write(
            f"(the context is full: the model no longer sees the first {left_out} turns)\n"
        )
    text, interrupted = speaker.answer(prompt)
    speaker.write(" [stopped]\n" if interrupted else "\n")
    if text:
        conversation.turns.append((user, text))


def make_encode(engine: HybridEngine) -> tuple[Callable[[Any], list[int]], str]:
    """(messages or text -> tokens, stop text), formatted as the data part formats training rows."""
    from hybrid_engine.config import DataConfig
    from hybrid_engine.data.encode import Encoder
    from hybrid_engine.data.records import BadRow

    templated = bool(getattr(engine.tokenizer, "chat_template", None))
    encoder = Encoder(
        engine.tokenizer,
        DataConfig(chat_template="auto" if templated else "never"),
        engine.eos_token_ids,
    )

    def encode(messages: Any) -> list[int]:
        try:
            return encoder.prompt(messages)[1]
        except BadRow as error:
            raise UserError(str(error)) from None

    return encode, "" if templated else NEXT_TURN


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hybrid_engine.chat",
        description="Talk to a trained model.",
        epilog="In the conversation: " + COMMANDS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "path", help="directory or hub name of a model or an adapter, such as output/rlhf/actor"
    )
    parser.add_argument(
        "--base-model", help="model that an adapter goes on, in place of the one that it names"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="bfloat16 halves the weights' memory and answers faster; rounding them loses accuracy "
        "unless they were trained so",
    )
    parser.add_argument("--prompt", help="answer this and leave, printing only the answer")
    parser.add_argument(
        "--raw",
        action="store_true",
        help="with --prompt: continue the text as it is, without a template",
    )
    parser.add_argument("--system", default="", help="system prompt")
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="0 takes the most likely token"
    )
    parser.add_argument(
        "--top-p", type=float, default=0.9, help="draw from the likeliest tokens with this mass"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, help="draw from so many likeliest tokens; 0 is all"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer")
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed and words give the same answers"
    )
    parsed = parser.parse_args(argv)
    if parsed.raw and parsed.prompt is None:
        parser.error("--raw needs --prompt")
    return parsed


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def read_line() -> str:
    return input("> " if sys.stdin.isatty() else "")


@contextlib.contextmanager
def clean_stdout() -> Iterator[None]:
    """Standard output is for answers: what libraries print while they load goes to stderr.

    DeepSpeed, which trains and so has no part here, remarks on the accelerator when it is imported;
    that is left out.
    """
    deepspeed = logging.getLogger("DeepSpeed")
    before, deepspeed.disabled = deepspeed.disabled, True
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        deepspeed.disabled = before


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Without the place in this package that warns."""
    print(f"warning: {message}", file=sys.stderr)


def load(options: argparse.Namespace) -> tuple[HybridEngine, SamplingParams]:
    from hybrid_engine.engine import HybridEngine, SamplingParams

    params = SamplingParams(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    engine = HybridEngine.from_pretrained(options.path, options.dtype, base=options.base_model)
    return engine, params


def run(options: argparse.Namespace) -> None:
    with clean_stdout(), warnings.catch_warnings():
        warnings.showwarning = show_warning
        engine, params = load(options)
    encode, stop = make_encode(engine)
    context = engine.context_length
    answer_room = int(min(options.max_new_tokens, context / 2))  # the rest is for the history
    room = context - answer_room
    conversation = Conversation(encode, room, options.system)
    if options.raw:
        Speaker(engine, params, "", write).answer(encode(options.prompt), trim=False)
        write("\n")
    elif options.prompt is not None:
        respond(conversation, Speaker(engine, params, stop, write), options.prompt)
    else:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history for input()
        write(COMMANDS + "\n")
        talk(conversation, Speaker(engine, params, stop, write), read_line)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    try:
        run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
