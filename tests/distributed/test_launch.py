"""The launcher: exit codes, whose error is shown, who is stopped, and that no rank outlives it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybrid_engine.distributed.collectives import rank
from tests.distributed.ranks import ROOT, run_ranks

pytestmark = pytest.mark.multi_process
HERE = "tests.distributed.test_launch"


def environment_of_a_rank(directory):
    print(f"greetings from rank {rank()}")
    return {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}


def second_rank_fails(directory, how):
    from hybrid_engine.distributed.collectives import barrier

    Path(directory, f"pid-{rank()}").write_text(str(os.getpid()))
    barrier("both ranks are up")
    if rank() == 1:
        if how == "raise":
            raise ValueError("the reason that must be shown")
        os.kill(os.getpid(), signal.SIGKILL)
    barrier("waiting for the rank that fails")


def second_rank_is_stopped_after_its_report(directory, _):
    from hybrid_engine.distributed.collectives import barrier
    from hybrid_engine.distributed.process_group import report_failure

    if rank() == 1:
        report_failure("error: what came first", exit_code=2, complete=True)
    barrier("the report is there")
    if rank() == 1:
        time.sleep(600)
    sys.exit(3)


def wait_for_the_end(directory, _):
    Path(directory, f"pid-{rank()}").write_text(str(os.getpid()))
    time.sleep(600)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def pids(directory: Path, count: int = 2, patience: float = 180.0) -> list[int]:
    files = [directory / f"pid-{r}" for r in range(count)]
    deadline = time.monotonic() + patience
    while not all(f.exists() and f.read_text() for f in files):
        assert time.monotonic() < deadline, "ranks did not start"
        time.sleep(0.05)
    return [int(f.read_text()) for f in files]


def ended(processes: list[int], patience: float = 60.0) -> bool:
    deadline = time.monotonic() + patience
    while any(alive(pid) for pid in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(alive(pid) for pid in processes)


def test_ranks_know_who_they_are_and_only_the_first_speaks(tmp_path):
    done = run_ranks(f"{HERE}:environment_of_a_rank", 2, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "rank 0" in done.stdout
    assert "rank 1" not in done.stdout
    found = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2)]
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert found == [
        {"RANK": str(r), "WORLD_SIZE": "2", "OMP_NUM_THREADS": threads} for r in range(2)
    ]


@pytest.mark.parametrize(
    "how, code, shown",
    [("raise", 1, "the reason that must be shown"), ("kill", 137, "was ended by SIGKILL")],
)
def test_a_failing_rank_ends_the_run_with_its_error(tmp_path, how, code, shown):
    done = run_ranks(f"{HERE}:second_rank_fails", 2, str(tmp_path), how)
    assert done.returncode == code
    assert "rank 1 of 2" in done.stderr
    assert shown in done.stderr
    assert not any(alive(pid) for pid in pids(tmp_path))


def test_a_rank_stopped_after_its_report_gives_its_own_exit_code(tmp_path):
    done = run_ranks(f"{HERE}:second_rank_is_stopped_after_its_report", 2, str(tmp_path), "")
    assert done.returncode == 2
    assert done.stderr == "error: what came first\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_rank_outlives_the_launcher(tmp_path, number):
    """Ctrl-C is passed on; and when the launcher itself is killed, the ranks notice."""
    script = (
        "import sys; from hybrid_engine.distributed.launch import launch; "
        "sys.exit(launch('tests.distributed.ranks', sys.argv[1:], 2))"
    )
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    launcher = subprocess.Popen(
        [sys.executable, "-c", script, f"{HERE}:wait_for_the_end", str(tmp_path), ""],
        cwd=ROOT,
        env=environ,
        stderr=subprocess.DEVNULL,
    )
    ranks = pids(tmp_path)
    launcher.send_signal(number)
    code = launcher.wait(timeout=120)
    assert code == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert ended(ranks)
