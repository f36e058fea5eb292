"""Runs a function of a test module in several processes, through the product's own launcher."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(function: str, world_size: int, *arguments: str, timeout: float = 300.0):
    """Call `package.module:function(*arguments)` on `world_size` ranks; the completed launcher
    process."""
    script = (
        "import sys; from hybrid_engine.distributed.launch import launch; "
        f"sys.exit(launch('tests.distributed.ranks', sys.argv[1:], {world_size}, "
        "grace_seconds=5.0))"
    )
    environ = dict(os.environ)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS"):
        environ.pop(name, None)
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    return subprocess.run(
        [sys.executable, "-c", script, function, *arguments],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def results_of(function: str, world_size: int, directory: Path, timeout: float = 300.0) -> list:
    """What each rank's call `function(directory)` returned, as JSON, in rank order."""
    done = run_ranks(function, world_size, str(directory), timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(world_size)]


def main() -> None:
    from hybrid_engine.distributed import process_group
    from hybrid_engine.distributed.exit import end_process

    module, name = sys.argv[1].split(":")
    world = process_group.initialise()
    value = getattr(importlib.import_module(module), name)(*sys.argv[2:])
    if len(sys.argv) == 3:
        Path(sys.argv[2], f"{world.env.rank}.json").write_text(json.dumps(value))
    end_process(0)


if __name__ == "__main__":
    main()
