"""Ranks that stay up and do tasks on demand, so that a contest can time them from outside."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.002
TIMEOUT = timedelta(minutes=10)

Tasks = Mapping[str, Callable[..., Any]]


class Crew:
    """`size` ranks of one process group, started by the product's launcher.

    Args:
        make_tasks: ``package.module:function``, called once on every rank with `arguments`; it
            returns the tasks by name. They take and return what JSON can carry.
    """

    def __init__(self, size: int, make_tasks: str, *arguments: str) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._size, self._calls = size, 0
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
        environ.pop("OMP_NUM_THREADS", None)  # an equal share of the cores for every rank
        start = (
            "import sys; from hybrid_engine.distributed.launch import launch; "
            f"sys.exit(launch('benchmarks.crew', sys.argv[1:], {size}))"
        )
        command = [sys.executable, "-c", start, str(self._store.port), make_tasks, *arguments]
        self._launcher = subprocess.Popen(command, cwd=ROOT, env=environ)

    def __call__(self, task: str, **options: Any) -> list[Any]:
        """What the task returned on each rank, in rank order; all of them begin together.

        Raises:
            RuntimeError: a rank ended. It has said why on the standard error stream.
        """
        self._call(task, options)
        keys = [f"result/{self._calls}/{rank}" for rank in range(self._size)]
        while not self._store.check(keys):
            if self._launcher.poll() is not None:
                raise RuntimeError(f"a rank ended during {task!r}; see its output above")
            time.sleep(POLL_SECONDS)
        return [json.loads(self._store.get(key)) for key in keys]

    def close(self) -> None:
        """Send the ranks home, if they are still there."""
        self._call(None, {})
        self._launcher.wait()

    def _call(self, task: str | None, options: Mapping[str, Any]) -> None:
        self._calls += 1
        self._store.set(f"call/{self._calls}", json.dumps([task, options]))


def main() -> None:
    """A rank: ``python -m benchmarks.crew PORT MAKE_TASKS [ARGUMENT...]``."""
    from hybrid_engine.distributed.collectives import barrier, rank
    from hybrid_engine.distributed.exit import end_process
    from hybrid_engine.distributed.process_group import initialise

    port, make_tasks, *arguments = sys.argv[1:]
    initialise()
    store = TCPStore("127.0.0.1", int(port), is_master=False, timeout=TIMEOUT)
    module, function = make_tasks.split(":")
    tasks: Tasks = getattr(importlib.import_module(module), function)(*arguments)
    for number in itertools.count(1):
        task, options = json.loads(store.get(f"call/{number}"))  # waits for it
        if task is None:
            end_process(0)
        barrier(f"before {task!r}")
        store.set(f"result/{number}/{rank()}", json.dumps(tasks[task](**options)))


if __name__ == "__main__":
    main()
