"""Start and end of torch.distributed, with or without a launcher.

DeepSpeed is never left to discover MPI or to pick an accelerator: by the time it is imported the
process group exists and `DS_ACCELERATOR` says what `device.use_device` chose.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from hybrid_engine.distributed.device import compute_device, group_backend
from hybrid_engine.distributed.env import RankEnv, rank_env
from hybrid_engine.distributed.interface import interface_towards

# Set by our launcher: a pipe that closes when the launcher dies, and where a rank leaves its last
# words.
LIFELINE_FD = "HYBRID_ENGINE_LIFELINE_FD"
FAILURE_DIR = "HYBRID_ENGINE_FAILURE_DIR"

DEFAULT_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """The running process group and its key-value store."""

    env: RankEnv
    store: dist.Store
    timeout: timedelta


_world: World | None = None


def initialise(timeout: timedelta = DEFAULT_TIMEOUT) -> World:
    """Join the process group once, until the process ends; later calls return the same world.

    One process alone needs neither a port nor a launcher: its store lives in memory.
    Tensors in CPU memory travel over gloo, those on GPUs over NCCL.
    """
    global _world
    if _world is not None:
        return _world
    env = rank_env()
    env.export(os.environ)
    _watch_lifeline()
    _report_uncaught()
    if env.world_size > env.local_world_size and (interface := interface_towards(env.master_addr)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ["DS_ACCELERATOR"] = compute_device().type  # read when deepspeed is imported
    store = _open_store(env, timeout)
    dist.init_process_group(
        group_backend(),
        store=dist.PrefixStore("group", store),
        rank=env.rank,
        world_size=env.world_size,
        timeout=timeout,
    )
    _world = World(env, dist.PrefixStore("hybrid_engine", store), timeout)
    atexit.register(shut_down)
    return _world


def shut_down() -> None:
    """Leave the process group, so that the interpreter ends without a warning.

    There is no way back: DeepSpeed keeps the group that it saw first.
    """
    global _world
    if _world is not None:
        dist.destroy_process_group()
        _world = None


def current_world() -> World | None:
    """The world that :func:`initialise` joined, or None in a process that never did."""
    return _world


def report_failure(message: str, exit_code: int, complete: bool = False) -> bool:
    """Leave this rank's error where the launcher looks for the earliest one.

    The launcher may stop this rank before it exits by itself, so `exit_code` is said here too.
    A `complete` message says it all: the launcher shows it in place of the rank's last lines.
    Returns whether there is a launcher.
    """
    directory = os.environ.get(FAILURE_DIR)
    if not directory:
        return False
    path = Path(directory) / f"rank-{rank_env().rank}.json"
    partial = path.with_suffix(".partial")
    report = {
        "time": time.time(),
        "message": message,
        "exit_code": exit_code,
        "complete": complete,
    }
    partial.write_text(json.dumps(report))
    partial.replace(path)  # the launcher reads the whole of it or nothing
    return True


def _report_uncaught() -> None:
    """Time-stamp any uncaught error: when one rank fails, its peers fail too, a little later."""
    if FAILURE_DIR not in os.environ:
        return
    show = sys.excepthook

    def report_and_show(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        exit_code = 128 + signal.SIGINT if issubclass(kind, KeyboardInterrupt) else 1
        report_failure(f"{kind.__name__}: {error}", exit_code)
        show(kind, error, trace)

    sys.excepthook = report_and_show


def _open_store(env: RankEnv, timeout: timedelta) -> dist.Store:
    if env.world_size == 1:
        return dist.HashStore()
    store, _, _ = next(iter(dist.rendezvous("env://", timeout=timeout)))
    store.set_timeout(timeout)
    return store


def _watch_lifeline() -> None:
    """End with the launcher: an orphaned rank would go on writing into the output directory."""
    descriptor = os.environ.pop(LIFELINE_FD, None)
    if descriptor is None:
        return

    def wait_for_end_of_file() -> None:
        os.read(int(descriptor), 1)
        os._exit(1)

    threading.Thread(target=wait_for_end_of_file, name="launcher-lifeline", daemon=True).start()
