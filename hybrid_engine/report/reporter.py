"""The reporter: the one place a run speaks through."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from hybrid_engine.distributed.collectives import enter_phase
from hybrid_engine.errors import UserError
from hybrid_engine.report.capture import LibraryCapture
from hybrid_engine.report.clock import PhaseClock
from hybrid_engine.report.display import make_display, sample_text
from hybrid_engine.report.files import MetricsFile, SummaryFile
from hybrid_engine.report.memory import PhasePeaks
from hybrid_engine.report.run_log import RunLog
from hybrid_engine.report.summary import print_summary
from hybrid_engine.report.text import finite, number, printable
from hybrid_engine.report.view import StageView

SHOWN_CHARACTERS = 600  # of a sample on the screen; run.log has all of it


class Reporter:
    """Shows a run and writes OUTPUT/{run.log, metrics.jsonl, summary.json}.

    Use it as a context manager: inside, Python warnings and libraries' log records become part of
    the report. With ``main=False`` (every rank but 0) nothing is written and only warnings are
    shown, on stderr.
    """

    def __init__(self, output_dir: str | Path, main: bool = True) -> None:
        self.output_dir = Path(output_dir)
        self.main = main
        self._view: StageView | None = None
        self._clock = PhaseClock()
        self._peaks = PhasePeaks()
        self._spent_before: dict[str, Any] = {}
        self.planned_bytes: dict[str, dict[str, int]] = {}
        self.failed_phase = ("", "")
        self._warned: Counter[str] = Counter()
        self._capture: LibraryCapture | None = None
        self._closed = False
        self._summary = SummaryFile(self.output_dir / "summary.json")
        if main:
            self._open_files()
            self._display = make_display(sys.stdout)

    def _open_files(self) -> None:
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self._metrics = MetricsFile(self.output_dir / "metrics.jsonl")
            self._log = RunLog(self.log_path)
        except OSError as error:
            raise UserError(
                f"--output-dir {self.output_dir}: {error.strerror} ({error.filename}); "
                "choose a writable directory"
            ) from None

    def __enter__(self) -> Reporter:
        self._capture = LibraryCapture(self._library_message)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if error is not None:
            self._write_traceback(error)
        self.close()

    def _write_traceback(self, error: BaseException) -> None:
        """Into run.log, whichever rank failed; where rank 0's files are out of reach, nowhere."""
        text = "".join(traceback.format_exception(error))
        if self.main:
            self._log.write(text)
        elif self.log_path.is_file():
            log = RunLog(self.log_path)
            log.write(f"rank {os.environ.get('RANK', '?')}: {text}")
            log.close()

    @property
    def log_path(self) -> Path:
        """OUTPUT/run.log."""
        return self.output_dir / "run.log"

    def close(self) -> None:
        """Says how often repeated warnings came, and closes the files."""
        if self._closed:
            return
        self._closed = True
        if self._capture is not None:
            self._capture.close()
        for text, times in self._warned.items():
            if times > 1:
                self.note(f"{times} times: {text}")
        if self.main:
            self._metrics.close()
            self._log.close()

    @contextmanager
    def stage(
        self, name: str, total: int, start: int = 0, spent: Mapping[str, Any] | None = None
    ) -> Iterator[None]:
        """The stage `name` of `total` iterations, `start` of them done by an earlier process, for
        which it `spent` what :meth:`spent` gave there.

        When it ends without an error, its ``seconds`` and ``phase_seconds`` go to summary.json.
        """
        if self._view is not None:
            raise RuntimeError(f"stage {name!r} began inside stage {self._view.name!r}")
        if self._capture is not None:
            self._capture.adopt()
        self._clock = PhaseClock()
        self._spent_before = dict(spent or {})
        self._view = StageView(name, total, start, self._clock)
        if self.main:
            self._display.open(self._view)
        try:
            yield
        finally:
            if self.main:
                self._display.close()
            self._view = None
        self.summarize(name, {**self.spent(), "phase_gigabytes": self.memory(name)})
        self._peaks.end_stage()

    def memory(self, stage: str) -> dict[str, dict[str, float]]:
        """Peak memory of each phase of a stage so far: planned (where it was) and measured, in
        10^9 bytes.
        """
        planned = self.planned_bytes.get(stage, {})
        return {
            phase: {
                **({"planned": planned[phase] / 1e9} if phase in planned else {}),
                "measured": nbytes / 1e9,
            }
            for phase, nbytes in self._peaks.bytes.items()
        }

    def spent(self) -> dict[str, Any]:
        """``seconds`` and ``phase_seconds`` of the stage so far, with those of earlier
        processes.
        """
        phases = dict(self._spent_before.get("phase_seconds", {}))
        for name, seconds in self._clock.seconds.items():
            phases[name] = phases.get(name, 0.0) + seconds
        seconds = self._spent_before.get("seconds", 0.0) + self._clock.elapsed()
        return {"seconds": seconds, "phase_seconds": phases}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is running now, here and for the messages of ranks that wait. Phases may nest; an
        inner one's seconds are not the outer one's.
        """
        enter_phase(name)
        try:
            with self._clock.phase(name), self._peaks.phase(name):
                self._count(0, 0)
                yield
        except BaseException:
            if not self.failed_phase[1]:  # the innermost
                self.failed_phase = (self._view.name if self._view else "", name)
            raise
        self._count(0, 0)

    def _count(self, done: int, total: int) -> None:
        if self._view is not None:
            self._view.phase_done, self._view.phase_total = done, total

    def tick(self, done: int, total: int, tokens: int = 0) -> None:
        """`done` of `total` pieces of the current phase; `tokens` counts from the phase's
        beginning.
        """
        self._clock.count(tokens)
        self._count(done, total)
        if self.main:
            self._display.tick()

    def log(self, stage: str, iteration: int, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; `iteration` counts finished iterations, scalars may be
        tensors.

        ``seconds_<phase>``, ``tokens_per_second_<phase>`` and ``gigabytes_<phase>`` (peak memory)
        since the last call are added; a value named ``tokens`` counts for the phase ``train``.
        NaN and infinities become null and are named under ``nonfinite``.
        """
        timings = self._clock.take()
        if "tokens" in values and timings.get("seconds_train"):
            timings.setdefault(
                "tokens_per_second_train", float(values["tokens"]) / timings["seconds_train"]
            )
        peaks = {f"gigabytes_{phase}": n / 1e9 for phase, n in self._peaks.take().items()}
        record = finite({"stage": stage, "iteration": iteration, **values, **timings, **peaks})
        if not self.main:
            return
        self._metrics.append(record)
        view = self._view or StageView(stage, iteration, iteration, self._clock)
        view.record(iteration, record)
        line = view.line(iteration, record)
        self._log.write(line)
        self._display.iteration(line)
        for key in record.get("nonfinite", ()):
            self.warn(f"{stage}: {key} is not finite")

    def sample(self, prompt: str, answer: str, score: float | None = None, title: str = "") -> None:
        """Shows a prompt and its answer; long ones are cut on the screen, not in run.log."""
        if not self.main:
            return
        parts = [title, f"score {number(score)}" if score is not None else ""]
        heading = ", ".join(part for part in parts if part)
        prompt, answer = printable(prompt), printable(answer)
        self._log.write(sample_text(heading, prompt, answer))
        self._display.sample(heading, cut(prompt), cut(answer))

    def note(self, text: str) -> None:
        if self.main:
            self._show(printable(text))

    def warn(self, text: str) -> None:
        """Shows `text` the first time it comes; :meth:`close` says how often it came."""
        text = printable(text)
        self._warned[text] += 1
        if self._warned[text] > 1:
            return
        if self.main:
            self._show(f"warning: {text}", "yellow")
        else:
            print(f"rank {os.environ.get('RANK', '?')}: warning: {text}", file=sys.stderr)

    def _show(self, text: str, style: str = "") -> None:
        self._log.write(text)
        self._display.message(text, style)

    def _library_message(self, level: int, text: str) -> None:
        if level >= logging.WARNING:
            self.warn(text)
        elif self.main:
            self._log.write(printable(text))

    def summarize(self, stage: str, values: Mapping[str, Any]) -> None:
        """Merges `values` into the stage's object in summary.json."""
        if self.main:
            self._summary.merge(stage, values)

    def summary(self) -> dict[str, Any]:
        """The content of summary.json, on every rank; empty when there is none."""
        return self._summary.read()

    def print_summary(self) -> None:
        """Shows summary.json as a table."""
        if self.main:
            summary = self._summary.read()
            print_summary(summary)
            text = io.StringIO()
            print_summary(summary, Console(file=text, width=100, color_system=None))
            self._log.write("\n".join(line.rstrip() for line in text.getvalue().splitlines()))

    @property
    def lines(self) -> int:
        """Lines of metrics.jsonl: for a checkpoint, and back to :meth:`truncate` on resuming."""
        return self._metrics.lines if self.main else 0

    def truncate(self, lines: int) -> None:
        """Keeps the first `lines` lines: the checkpoint being resumed knows no more."""
        if self.main:
            if lines > self.lines:
                self.warn(
                    f"metrics.jsonl has {self.lines} lines, the checkpoint was taken after {lines}"
                )
            self._metrics.truncate(lines)

    def restart(self, stage: str) -> None:
        """Drops what an earlier run left about `stage` in metrics.jsonl and summary.json."""
        if self.main:
            self._metrics.drop(stage)
            self._summary.drop(stage)


def cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " [...]"
