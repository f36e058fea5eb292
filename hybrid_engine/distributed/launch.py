"""`--num-gpus N`: start N local ranks, keep them together, end with the error that came first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid_engine.distributed.env import RankEnv
from hybrid_engine.distributed.process_group import FAILURE_DIR, LIFELINE_FD

_POLL_SECONDS = 0.05
_TAIL_LINES = 40
# A rank that ended so could not report; its peers could, but know only that they lost it.
_CRASHES = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)


def launch(
    module: str, arguments: Sequence[str], num_processes: int, grace_seconds: float = 10.0
) -> int:
    """Run `python -m module arguments` as `num_processes` ranks of one group and return the exit
    code.

    Rank 0 writes to this terminal; the others are silent unless one of them fails first, when its
    last lines are shown. When a rank fails the others get SIGTERM, and SIGKILL after
    `grace_seconds`. Ctrl-C is passed on once; a second one kills. If this process dies, so do the
    ranks. Each rank gets an equal share of the cores unless OMP_NUM_THREADS is set already.
    """
    from torch.distributed import TCPStore

    # The store lives here, so its port is known without a race for a free one.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="hybrid-engine-ranks-") as scratch:
        ranks = _Ranks(Path(scratch), grace_seconds)
        try:
            # Before the ranks start: a signal that this process handles, they receive, even where
            # it was ignored (as SIGINT is in a shell's background job).
            with ranks.forwarding_signals():
                for rank in range(num_processes):
                    env = RankEnv(rank, num_processes, rank, num_processes, "127.0.0.1", store.port)
                    ranks.start(env, [sys.executable, "-m", module, *arguments])
                return ranks.wait()
        finally:
            ranks.kill()


@dataclass
class _Ranks:
    """The running processes, by rank."""

    scratch: Path
    grace_seconds: float
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    lifelines: list[int] = field(default_factory=list)
    interrupts: int = 0

    def start(self, env: RankEnv, command: list[str]) -> None:
        reader, writer = os.pipe()
        environ = dict(os.environ)
        env.export(environ)
        environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // env.local_world_size)))
        environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        environ[LIFELINE_FD] = str(reader)
        environ[FAILURE_DIR] = str(self.scratch)
        log = nullcontext() if env.is_main else self._log(env.rank).open("wb")
        with log as output:
            # Own sessions: the terminal's Ctrl-C reaches this process alone, which passes it on.
            process = subprocess.Popen(
                command,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(reader,),
                start_new_session=True,
            )
        self.processes.append(process)
        os.close(reader)
        self.lifelines.append(writer)

    @contextmanager
    def forwarding_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM go to the ranks."""
        previous = {s: signal.signal(s, self._forward) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def wait(self) -> int:
        """Exit code of the group: 0, or that of the rank that failed first."""
        while True:
            codes = [p.poll() for p in self.processes]
            if any(codes):
                return self._fail(codes)
            if all(code == 0 for code in codes):
                return 0
            time.sleep(_POLL_SECONDS)

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for writer in self.lifelines:
            os.close(writer)
        self.lifelines = []

    def _forward(self, number: int, frame: object) -> None:
        self.interrupts += 1
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number if self.interrupts == 1 else signal.SIGKILL)

    def _fail(self, codes: Sequence[int | None]) -> int:
        """`codes`: exit codes so far, before this process stops the other ranks."""
        first_exit = next(rank for rank, code in enumerate(codes) if code)
        crashed = [rank for rank, code in enumerate(codes) if code and -code in _CRASHES]
        self._stop_others()
        failed = crashed[0] if crashed else self._earliest_report(default=first_exit)
        # A rank that reported may have been stopped before it could exit with its own code.
        code = (
            self._report(failed).get("exit_code")
            or self.processes[failed].returncode
            or self.processes[first_exit].returncode
        )
        if self.interrupts == 0:
            self._show(failed, code)
        return 128 - code if code < 0 else code

    def _stop_others(self) -> None:
        deadline = time.monotonic() + self.grace_seconds
        for process in self.processes:
            if process.poll() is None and self.interrupts == 0:
                process.terminate()
        while any(p.poll() is None for p in self.processes) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def _earliest_report(self, default: int) -> int:
        """The rank whose error came first: its peers fail too, when their connections break."""
        times = {
            rank: report["time"]
            for rank in range(len(self.processes))
            if (report := self._report(rank))
        }
        return min(times, key=times.__getitem__) if times else default

    def _report(self, rank: int) -> dict[str, Any]:
        """What `process_group.report_failure` left; empty where the rank left nothing."""
        path = self.scratch / f"rank-{rank}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def _show(self, failed: int, code: int) -> None:
        if sys.stdout.isatty():  # a rank that was stopped leaves its live panel's cursor hidden
            print("\x1b[?25h", end="", flush=True)
        if (report := self._report(failed)).get("complete"):
            print(report["message"], file=sys.stderr, flush=True)
            return
        how = (
            f"was ended by {signal.Signals(-code).name}"
            if code < 0
            else f"failed with exit code {code}"
        )
        print(
            f"rank {failed} of {len(self.processes)} {how}; the other ranks were stopped",
            file=sys.stderr,
        )
        if failed > 0:
            lines = self._log(failed).read_text(errors="replace").splitlines()
            print("\n".join(lines[-_TAIL_LINES:]), file=sys.stderr, flush=True)

    def _log(self, rank: int) -> Path:
        return self.scratch / f"rank-{rank}.log"


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
