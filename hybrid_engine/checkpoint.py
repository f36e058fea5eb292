"""Resumable state, written so that a kill at any moment leaves a whole checkpoint behind.

    OUTPUT/checkpoints/STAGE/step-000120/{state.json, rng-00000.json ..., tensors/, ENGINE/ ...}
    OUTPUT/checkpoints/STAGE/latest       the name of the newest whole checkpoint

A checkpoint is written under a temporary name, synced to disk, renamed, and only then named by
`latest` (itself replaced by rename). All of it is JSON and safetensors, and may be read by another
number of ranks than wrote it; they need one file system.
"""

from __future__ import annotations

import base64
import hashlib
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

from hybrid_engine.distributed.collectives import barrier, is_main, rank, world_size
from hybrid_engine.distributed.parts import Part, PartReader, write_parts
from hybrid_engine.errors import UserError

_LATEST = "latest"
_PARTIAL = ".partial"
_TENSORS = "tensors"


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
        ranks: how many wrote the checkpoint.
        metrics_lines: lines of metrics.jsonl written; resuming cuts the file back to them.
        components: JSON-able state by name: KL controller, running moments, whatever else a stage
            has.
    """

    stage: str
    iteration: int
    metrics_lines: int = 0
    ranks: int = field(default_factory=world_size)
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
        tensors: Mapping[str, Part] | None = None,
    ) -> Path:
        """Write checkpoint number `step` (it must grow over the whole run) and drop old ones.

        `tensors` are this rank's parts of others (EMA averages); the random states of this process
        are added.
        """
        name = f"step-{step:06d}"
        with self._publish(name) as partial:
            for engine_name, engine in (engines or {}).items():
                engine.save(partial / engine_name)
            if tensors:
                write_parts(partial / _TENSORS, tensors)
            _rng_file(partial, rank()).write_text(json.dumps(_random_states()))
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
        self,
        path: Path,
        engines: Mapping[str, Saveable] | None = None,
        tensors: Mapping[str, Part] | None = None,
    ) -> RunState:
        """Load engines and this process's random states, fill `tensors`; return the plain state.

        A rank that the checkpoint does not know gets random states of its own, which follow from
        those of rank 0.

        Raises:
            UserError: the checkpoint is damaged, or of a run that trained something else.
        """
        state = self.read_state(path)
        for name, engine in (engines or {}).items():
            engine.load(path / name)
        if tensors:
            if not (path / _TENSORS).is_dir():
                raise UserError(
                    f"{path} holds no averages of the weights: the run that wrote it had "
                    "rlhf.ema_decay 0; resume with that"
                )
            with PartReader(path / _TENSORS, state.ranks) as saved:
                for name, part in tensors.items():
                    saved.fill(name, part)
        _restore_random_states(path)
        return state

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


def _rng_file(directory: Path, of_rank: int) -> Path:
    return directory / f"rng-{of_rank:05d}.json"


def _random_states() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
    }


def _restore_random_states(directory: Path) -> None:
    own = _rng_file(directory, rank())
    if not own.exists():
        _seed_from(_rng_file(directory, 0))
        return
    states = json.loads(own.read_text())
    torch_state = bytearray(base64.b64decode(states["torch"]))
    torch.set_rng_state(torch.frombuffer(torch_state, dtype=torch.uint8))
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def _seed_from(path: Path) -> None:
    """Random states for a rank that is new: different on each, equal each time."""
    digest = hashlib.sha256(path.read_bytes() + str(rank()).encode()).digest()
    seeds = [int.from_bytes(digest[i : i + 4], "little") for i in (0, 4, 8)]
    torch.manual_seed(seeds[0])
    random.seed(seeds[1])
    np.random.seed(seeds[2])


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
