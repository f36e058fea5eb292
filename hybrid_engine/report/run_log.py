"""OUTPUT/run.log: everything the run showed, and what libraries logged, with the time of day."""

from __future__ import annotations

import time
from pathlib import Path


class RunLog:
    """Appends; lines are flushed one by one."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)

    def write(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.writelines(f"{stamp}  {line}\n" for line in text.splitlines() or [""])
        self._file.flush()

    def close(self) -> None:
        self._file.close()
