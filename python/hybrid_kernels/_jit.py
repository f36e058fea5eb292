"""Builds the native library into a user cache, once for all processes.

::

    CACHE/<configuration>/lock
    CACHE/<configuration>/objects/       ninja's folder: an edit rebuilds its own objects only
    CACHE/<configuration>/<key>/_C.so    finished libraries, by the content of their sources

A configuration is a source tree, a torch, a Python and a compiler; with CUDA kernels or without,
the other objects are the same.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hybrid_kernels._build import SPEC, Toolchain, binary_key, compile_library, usable_cores

SECONDS_PER_OBJECT = 3.5  # on one core of a 2023 server; only for the notice
KEPT_LIBRARIES = 4
LIBRARY = "_C.so"


def cache_root() -> Path:
    """The folder of all built libraries."""
    if explicit := os.environ.get("HYBRID_KERNELS_CACHE"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "hybrid_kernels"


def cached_library(csrc: Path, key: str) -> Path:
    """The library with this key, from the cache or built now; `BuildError` if that fails."""
    tools = Toolchain.detect()
    cuda = tools.nvcc is not None
    home = cache_root() / configuration(csrc, tools)
    library = home / key / LIBRARY
    if library.is_file():
        return library
    home.mkdir(parents=True, exist_ok=True)
    with locked(home / "lock"):
        while not library.is_file():
            built = _compile(csrc, home / "objects", tools)
            # A source saved meanwhile may be in it or not: publish only what the key describes.
            if binary_key(csrc, tools.torch_version, cuda) == key:
                _publish(built, library)
            else:
                key = binary_key(csrc, tools.torch_version, cuda)
                library = home / key / LIBRARY
        _forget_old(home)
    return library


def configuration(csrc: Path, tools: Toolchain) -> str:
    """The cache folder of a source tree, a torch, a Python and a compiler."""
    parts = (
        str(csrc),
        tools.cxx,
        tools.cxx_version,
        tools.torch_version,
        str(tools.torch_root),
        sys.version,
    )
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    version = f"py{sys.version_info.major}{sys.version_info.minor}-torch{tools.torch_version}"
    return f"{version}-{digest}"


def _compile(csrc: Path, build_dir: Path, tools: Toolchain) -> Path:
    fresh = not (build_dir / ".ninja_log").is_file()
    objects = len(SPEC.units(csrc, tools.nvcc is not None))
    about = max(10, round(objects * SECONDS_PER_OBJECT / usable_cores(), -1))
    estimate = f"once, about {about:.0f} s" if fresh else "the changed part"
    _say(f"building native kernels ({estimate}) ...")
    start = time.monotonic()
    library = compile_library(csrc, build_dir, tools, _show_progress)
    _say(f"built in {time.monotonic() - start:.0f} s")
    return library


def _publish(built: Path, library: Path) -> None:
    """Copies, then renames: a reader sees the whole file or none."""
    library.parent.mkdir(exist_ok=True)
    partial = library.with_name(f"{LIBRARY}.{os.getpid()}")
    shutil.copy2(built, partial)
    os.utime(partial)
    os.replace(partial, library)


def _forget_old(home: Path) -> None:
    """Keeps the newest few libraries; a process that has an older one open is not disturbed."""
    finished = [path for path in home.glob(f"*/{LIBRARY}") if path.parent.name != "objects"]
    finished.sort(key=lambda path: path.stat().st_mtime)
    for library in finished[:-KEPT_LIBRARIES]:
        shutil.rmtree(library.parent, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock that dies with the process."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process is building the native kernels; waiting for it ...")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\r" if done < total else "\n"
        print(f"hybrid_kernels: {done}/{total} objects", end=end, file=sys.stderr, flush=True)


def _say(message: str) -> None:
    print(f"hybrid_kernels: {message}", file=sys.stderr, flush=True)
