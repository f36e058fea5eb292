"""Where a run shows itself: plain lines in a pipe, a live panel on a terminal. Both show the same
events.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, TextIO

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hybrid_engine.report.text import duration, number, sparkline
from hybrid_engine.report.view import StageView

HEARTBEAT = 30.0  # seconds between signs of life in a pipe
BAR = 32  # columns


class Display(Protocol):
    """What the reporter needs from a screen."""

    def open(self, view: StageView) -> None: ...
    def iteration(self, line: str) -> None: ...
    def tick(self) -> None: ...
    def message(self, text: str, style: str = "") -> None: ...
    def sample(self, title: str, prompt: str, answer: str) -> None: ...
    def close(self) -> None: ...


def make_display(stream: TextIO) -> Display:
    return (
        LiveDisplay(Console(file=stream, highlight=False))
        if stream.isatty()
        else PlainDisplay(stream)
    )


class PlainDisplay:
    """Lines of text without control characters."""

    def __init__(self, stream: TextIO, now: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._now = now
        self._view: StageView | None = None
        self._last = now()

    def open(self, view: StageView) -> None:
        self._view = view

    def iteration(self, line: str) -> None:
        self.message(line)

    def tick(self) -> None:
        """A phase that takes long says so now and then; a silent pipe looks hung."""
        if self._view and self._now() - self._last >= HEARTBEAT:
            self.message(self._view.phase_line())

    def message(self, text: str, style: str = "") -> None:
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()
        self._last = self._now()

    def sample(self, title: str, prompt: str, answer: str) -> None:
        self.message(sample_text(title, prompt, answer))

    def close(self) -> None:
        self._view = None


class LiveDisplay:
    """A stage's progress, phase and latest metrics at the foot of the terminal; everything else
    scrolls above it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._view: StageView | None = None
        self._live: Live | None = None

    def open(self, view: StageView) -> None:
        self._view = view
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
        self._live.start()

    def iteration(self, line: str) -> None:
        if self._live is None:
            self.message(line)

    def tick(self) -> None:
        """Nothing: the live panel redraws itself."""

    def message(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style))

    def sample(self, title: str, prompt: str, answer: str) -> None:
        body = Text(prompt, style="dim").append(answer, style="bold")
        self._console.print(Panel(body, title=Text(title), title_align="left", border_style="blue"))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._live = self._view = None

    def _render(self) -> RenderableType:
        return render(self._view) if self._view else Text("")


def render(view: StageView) -> RenderableType:
    """The live panel of a stage."""
    bars = Table.grid(padding=(0, 2))
    left = f"{duration(view.clock.elapsed())} elapsed, {duration(view.seconds_left())} left"
    bars.add_row(Text(view.name, style="bold"), bar(view.done, view.total), view.progress(), left)
    if view.phase:
        rate = view.clock.rate()
        share = f"{view.phase_done}/{view.phase_total}" if view.phase_total else ""
        bars.add_row(
            view.phase,
            bar(view.phase_done, view.phase_total),
            share,
            f"{rate:.0f} tok/s" if rate else "",
        )
    return Group(bars, Columns([metric(view, label) for label in view.latest], padding=(0, 3)))


def metric(view: StageView, label: str) -> Text:
    """A metric's name, its latest value and its course."""
    course = sparkline(list(view.history[label]))
    return Text.assemble(
        (label, "dim"), " ", (number(view.latest[label]), "bold"), " ", (course, "cyan")
    )


def bar(done: int, total: int) -> ProgressBar:
    """A bar that pulses while the amount of work is unknown."""
    return ProgressBar(total=total or None, completed=done, width=BAR, pulse=not total)


def sample_text(title: str, prompt: str, answer: str) -> str:
    lines = [f"sample: {title}"]
    for name, text in (("prompt", prompt), ("answer", answer)):
        first, *rest = text.splitlines() or [""]
        lines += [f"  {name}: {first}", *(f"          {line}" for line in rest)]
    return "\n".join(lines)
