"""The files of a run that other programs read: metrics.jsonl and summary.json. Both are valid after
a kill at any moment.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrid_engine.errors import UserError
from hybrid_engine.report.text import finite


class MetricsFile:
    """One JSON object a line. Every line is one write to the operating system, so a killed run
    loses none.
    """

    def __init__(self, path: Path) -> None:
        """Opens `path` for appending and drops a last line that a crash of the machine left
        incomplete.
        """
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(self._fd, whole)
        self.lines = content.count(b"\n")

    def append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(finite(record), allow_nan=False, ensure_ascii=False).encode() + b"\n"
        while line:
            line = line[os.write(self._fd, line) :]
        self.lines += 1

    def truncate(self, lines: int) -> None:
        """Keeps the first `lines` lines."""
        kept = self.path.read_bytes().splitlines(keepends=True)[:lines]
        os.ftruncate(self._fd, sum(map(len, kept)))
        self.lines = len(kept)

    def drop(self, stage: str) -> None:
        """Removes the lines of one stage, atomically."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line).get("stage") != stage]
        if len(kept) == len(lines):
            return
        os.close(self._fd)
        write_atomically(self.path, b"".join(kept))
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND)
        self.lines = len(kept)

    def close(self) -> None:
        os.close(self._fd)


class SummaryFile:
    """One JSON object, a key a stage, replaced as a whole at every change."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise UserError(
                f"{self.path}: not valid JSON ({error}); move it away and start again"
            ) from None
        if not isinstance(content, dict):
            raise UserError(f"{self.path}: expected a JSON object; move it away and start again")
        return content

    def merge(self, stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Sets `values` in the stage's object; what else it holds stays. Returns the whole."""
        summary = self.read()
        merged = {key: value for key, value in summary.get(stage, {}).items() if key != "nonfinite"}
        lost = [key for key in summary.get(stage, {}).get("nonfinite", []) if key not in values]
        added = finite(values)
        lost += added.pop("nonfinite", [])
        summary[stage] = {**merged, **added, **({"nonfinite": lost} if lost else {})}
        return self._write(summary)

    def drop(self, stage: str) -> None:
        summary = self.read()
        if summary.pop(stage, None) is not None:
            self._write(summary)

    def _write(self, summary: dict[str, Any]) -> dict[str, Any]:
        text = json.dumps(summary, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        write_atomically(self.path, text.encode())
        return summary


def write_atomically(path: Path, content: bytes) -> None:
    """Readers see the old content or the new, never a part, whenever the process dies."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
