"""Warnings and log records of libraries, brought into the run's own report."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

OURS = {"hybrid_engine", "hybrid_kernels"}


class Forward(logging.Handler):
    """Hands each record's level and text on; a handler must not raise into the code that logs."""

    def __init__(self, receive: Callable[[int, str], None]) -> None:
        super().__init__(logging.INFO)
        self._receive = receive

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.name != "py.warnings":
            text = f"{record.name}: {text}"
        self._receive(record.levelno, text)


class LibraryCapture:
    """Python warnings and log records go to `receive(level, text)` instead of the streams, until
    closed.

    Libraries with a stream handler of their own (DeepSpeed, transformers) would write across the
    live panel.
    """

    def __init__(self, receive: Callable[[int, str], None]) -> None:
        self._handler = Forward(receive)
        self._taken: list[tuple[logging.Logger, logging.Handler, bool]] = []
        self._showwarning = warnings.showwarning
        warnings.showwarning = _show(receive)
        logging.getLogger().addHandler(self._handler)
        self.adopt()

    def adopt(self) -> None:
        """Takes over the stream handlers of loggers made since; libraries set them up when they are
        imported.
        """
        for logger in known_loggers():
            for handler in stream_handlers(logger):
                self._taken.append((logger, handler, logger.propagate))
                logger.removeHandler(handler)
                logger.propagate = True

    def close(self) -> None:
        warnings.showwarning = self._showwarning
        logging.getLogger().removeHandler(self._handler)
        for logger, handler, propagate in reversed(self._taken):
            logger.addHandler(handler)
            logger.propagate = propagate
        self._taken.clear()


def _show(receive: Callable[[int, str], None]) -> Callable[..., None]:
    def showwarning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: object = None,
        line: str | None = None,
    ) -> None:
        # Ours are addressed to the user, who need not know where they arose.
        ours = not OURS.isdisjoint(Path(filename).parent.parts[-3:])
        place = "" if ours else f"{filename}:{lineno}: {category.__name__}: "
        receive(logging.WARNING, f"{place}{message}")

    return showwarning


def known_loggers() -> list[logging.Logger]:
    existing = logging.root.manager.loggerDict.values()
    return [
        logging.getLogger(),
        *(logger for logger in existing if isinstance(logger, logging.Logger)),
    ]


def stream_handlers(logger: logging.Logger) -> list[logging.Handler]:
    """Its handlers that write to the process's own streams (files and test captures stay)."""
    streams = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return [
        own
        for own in logger.handlers
        if isinstance(own, logging.StreamHandler) and own.stream in streams
    ]
