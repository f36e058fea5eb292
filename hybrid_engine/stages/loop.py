"""The frame of every step: numbered batches, and what must survive a kill."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch

from hybrid_engine.checkpoint import RunState
from hybrid_engine.data import Batches, rank_share
from hybrid_engine.distributed.collectives import rank, world_size
from hybrid_engine.distributed.parts import Part
from hybrid_engine.engine.train_engine import TrainEngine
from hybrid_engine.run import Run
from hybrid_engine.stages.update import hash_seed

T = TypeVar("T")


class Component(Protocol):
    """Small state that a stage carries from iteration to iteration: a KL controller, running
    moments.
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StageLoop:
    """Iterates over (step, batch of row indices), beginning where an interrupted run stopped.

    Attributes:
        total: steps of the whole stage.
        start: steps that an earlier process has done.
        spent: seconds that it took for them, as `Reporter.stage` adds them to its own.
        memory: what was measured before training (JSON-able), which a resumed run must not measure
            again.
    """

    def __init__(
        self,
        run: Run,
        stage: str,
        batches: Batches,
        save_steps: int,
        engines: Mapping[str, TrainEngine],
        components: Mapping[str, Component] | None = None,
        averages: Mapping[str, Part] | None = None,
    ) -> None:
        self._run = run
        self._stage = stage
        self._batches = batches
        self._save_steps = save_steps
        self._engines = engines
        self._components = components or {}
        self._averages = averages
        self._checkpoints = run.checkpoints(stage)
        self.total = len(batches)
        self.start = 0
        self.spent: dict[str, Any] = {}
        self.memory: dict[str, Any] = {}
        torch.manual_seed(hash_seed(run.config.seed, rank()))  # LoRA dropout; a checkpoint has it
        self._resume()

    def _resume(self) -> None:
        path = self._checkpoints.latest() if self._run.config.resume else None
        if path is None:
            self._run.forget(self._stage)  # or a later --resume would pick up an older run's state
            return
        state = self._checkpoints.restore(path, self._engines, self._averages)
        for name, component in self._components.items():
            component.load_state_dict(state.components[name])
        self.memory = state.components["memory"]
        self.spent = state.components["spent"]
        self.start = state.iteration
        self._run.reporter.truncate(state.metrics_lines)
        self._run.reporter.note(f"{self._stage}: resumed after step {self.start} of {self.total}")

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        for step, indices in enumerate(self._batches.from_step(self.start), self.start + 1):
            yield step, indices
            if self.due(self._save_steps, step):
                self._save(step)

    def due(self, every: int, step: int) -> bool:
        """Whether something done every so many steps (0: never) is to be done after `step`, which
        is not the last.
        """
        return every > 0 and step % every == 0 and step < self.total

    def remember(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `measure` found before the first step, kept in checkpoints."""
        if not self.memory:
            self.memory = measure()
        return self.memory

    def _save(self, step: int) -> None:
        with self._run.phase("checkpoint"):
            components: dict[str, Any] = {
                name: c.state_dict() for name, c in self._components.items()
            }
            state = RunState(
                self._stage,
                iteration=step,
                metrics_lines=self._run.reporter.lines,
                components={
                    **components,
                    "memory": self.memory,
                    "spent": self._run.reporter.spent(),
                },
            )
            self._checkpoints.save(step, state, self._engines, self._averages)


def local_share(batch: Sequence[T]) -> list[T]:
    """This rank's part of a global batch."""
    return rank_share(batch, rank(), world_size())
