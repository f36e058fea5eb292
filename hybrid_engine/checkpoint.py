"""Resumable state, written so that a kill at any moment leaves a whole checkpoint behind.

    OUTPUT/checkpoints/STAGE/step-000120/{state.json, tensors-rank0.safetensors, rng-rank0.json,
                                          ENGINE/...}
    OUTPUT/checkpoints/STAGE/latest       the name of the newest whole checkpoint

A checkpoint is written under a temporary name, synced to disk, renamed, and only then named by
`latest` (itself replaced by rename). Our own state is JSON and safetensors. DeepSpeed's part
(ENGINE/) is its own format; it is read without unpickling anything but known classes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybrid_engine.distributed.collectives import barrier, is_main, rank
from hybrid_engine.errors import UserError

_LATEST = "latest"
_PARTIAL = ".partial"
_TORCH_RNG = "rng.torch"


class Saveable(Protocol):
    """What a checkpoint takes along besides plain state: a TrainEngine."""

    def save(self, directory: Path) -> None: ...

    def load(self, directory: Path) -> None: ...


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Attributes:
        stage: "sft", "reward" or "rlhf".
        iteration: optimizer steps (rollouts for rlhf) done in the stage; its data follow from it.
        metrics_lines: lines of metrics.jsonl written; resuming cuts the file back to them.
        components: JSON-able state by name: KL controller, running moments, whatever else a stage
            has.
    """

    stage: str
    iteration: int
    metrics_lines: int = 0
    components: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one output directory. Every rank makes one and calls the same methods.

    Args:
        directory: OUTPUT/checkpoints/STAGE.
        keep: how many of the newest stay.
    """

    def __init__(self, directory: str | Path, keep: int = 2) -> None:
        self.directory = Path(directory)
        self.keep = keep

    def save(
        self,
        step: int,
        state: RunState,
        engines: Mapping[str, Saveable] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write checkpoint number `step` (it must grow over the whole run) and drop old ones.

        `tensors` are this rank's own (EMA averages); the random states of this process are added.
        """
        name = f"step-{step:06d}"
        with self._publish(name) as partial:
            for engine_name, engine in (engines or {}).items():
                engine.save(partial / engine_name)
            _save_rank_state(partial, dict(tensors or {}))
            if is_main():
                (partial / "state.json").write_text(json.dumps(asdict(state)))
        return self.directory / name

    def clear(self) -> None:
        """Forget everything: a new run must not be resumed from an older one's state."""
        if is_main():
            shutil.rmtree(self.directory, ignore_errors=True)
        barrier("clear checkpoints")

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        pointer = self.directory / _LATEST
        if not pointer.exists():
            return None
        path = self.directory / pointer.read_text().strip()
        if not (path / "state.json").exists():
            raise UserError(
                f"{pointer} names {path}, which is missing or incomplete; delete {pointer} to "
                "start anew"
            )
        return path

    def read_state(self, path: Path) -> RunState:
        """The plain state of a checkpoint, without restoring anything."""
        return RunState(**json.loads((path / "state.json").read_text()))

    def restore(
        self, path: Path, engines: Mapping[str, Saveable] | None = None
    ) -> tuple[RunState, dict[str, Tensor]]:
        """Load engines and this process's random states; return the plain state and this rank's
        tensors."""
        for name, engine in (engines or {}).items():
            engine.load(path / name)
        tensors = _load_rank_state(path)
        return self.read_state(path), tensors

    @contextmanager
    def _publish(self, name: str) -> Iterator[Path]:
        """A directory that all ranks fill; it gets its name when all have done so."""
        partial = self.directory / (name + _PARTIAL)
        if is_main():
            _as_user_error(self.directory, lambda: self._prepare(partial))
        barrier("begin checkpoint")
        yield partial
        barrier("write checkpoint")  # a rank still writing renames files under the walk below
        _sync_tree(partial)
        barrier("sync checkpoint")
        if is_main():
            self._finish(partial, name)
        barrier("publish checkpoint")

    def _prepare(self, partial: Path) -> None:
        for leftover in self.directory.glob(f"*{_PARTIAL}"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        partial.mkdir(parents=True)

    def _finish(self, partial: Path, name: str) -> None:
        final = self.directory / name
        if final.exists():  # a run that resumed from an older checkpoint comes by again
            shutil.rmtree(final)
        os.rename(partial, final)
        pointer = self.directory / (_LATEST + _PARTIAL)
        pointer.write_text(name)
        _sync(pointer)
        os.replace(pointer, self.directory / _LATEST)
        _sync(self.directory)
        self._prune(name)

    def _prune(self, newest: str) -> None:
        names = sorted(
            p.name for p in self.directory.glob("step-*") if not p.name.endswith(_PARTIAL)
        )
        old = [name for name in names if name != newest]
        for name in old[: max(0, len(old) - (self.keep - 1))]:
            shutil.rmtree(self.directory / name)


def _save_rank_state(directory: Path, tensors: dict[str, Tensor]) -> None:
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    tensors[_TORCH_RNG] = torch.get_rng_state()
    save_file(tensors, directory / f"tensors-rank{rank()}.safetensors")
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    words_of_numpy = np.asarray(keys).tolist()
    generators = {
        "python": [version, list(words), gauss],
        "numpy": [kind, words_of_numpy, position, has_gauss, cached],
    }
    (directory / f"rng-rank{rank()}.json").write_text(json.dumps(generators))


def _load_rank_state(directory: Path) -> dict[str, Tensor]:
    path = directory / f"tensors-rank{rank()}.safetensors"
    if not path.exists():
        raise UserError(
            f"{directory} has no state of rank {rank()}; resume with the number of ranks that "
            "wrote it"
        )
    tensors = load_file(path)
    torch.set_rng_state(tensors.pop(_TORCH_RNG))
    generators = json.loads((directory / f"rng-rank{rank()}.json").read_text())
    version, words, gauss = generators["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = generators["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    return tensors


def _as_user_error(directory: Path, action: Callable[[], None]) -> None:
    try:
        action()
    except OSError as error:
        raise UserError(
            f"cannot write checkpoints into {directory}: {error.strerror}; free space or choose "
            "another --output-dir"
        ) from error


def _sync_tree(directory: Path) -> None:
    """Force files and directory entries to disk, so that a rename never outruns their bytes."""
    for parent, _, names in os.walk(directory):
        for name in names:
            _sync(Path(parent) / name)
        _sync(Path(parent))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
