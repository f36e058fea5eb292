"""A TrainEngine's part of a checkpoint: what is trained, AdamW's moments, and a few counts.

    DIRECTORY/train_state.json             who wrote it, what was trained, step counts
    DIRECTORY/part-00000.safetensors ...   each rank's stretches, see `distributed.parts`

Frozen weights are left out; a checksum tells whether they are the same when training goes on. The
loss scale of fp16 is not among the counts: DeepSpeed trains no fp16 on a CPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hybrid_engine.distributed.collectives import is_main, world_size
from hybrid_engine.distributed.parts import Part, PartReader, write_parts
from hybrid_engine.engine.master_state import parts_to_write, pieces_of, read_into, shard_of
from hybrid_engine.errors import UserError

_FILE = "train_state.json"
# DeepSpeed's own: its monitors' x axis.
_ENGINE_COUNTS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


class TrainState:
    """Saves and restores one module under one DeepSpeed engine, in any number of ranks.

    Args:
        name: for messages.
        frozen: from :func:`.frozen.frozen_checksum`, before ZeRO-3 took the weights apart.
    """

    def __init__(
        self, module: nn.Module, engine: Any, adamw: torch.optim.AdamW, name: str, frozen: int
    ) -> None:
        self._module = module
        self._engine = engine
        self._adamw = adamw
        self._name = name
        self._frozen = frozen
        self._pieces = pieces_of(module, engine.optimizer)

    def save(self, directory: Path, counts: dict[str, int]) -> None:
        """Every rank calls this; `counts` come back from :meth:`load`."""
        write_parts(directory, parts_to_write(self._pieces, self._adamw))
        if is_main():
            state = {
                **self._identity(),
                "ranks": world_size(),
                "engine": {key: getattr(self._engine, key) for key in _ENGINE_COUNTS},
                "counts": counts,
            }
            (directory / _FILE).write_text(json.dumps(state))

    def load(self, directory: Path) -> dict[str, int]:
        """Continues from :meth:`save`: bit for bit with as many ranks, else with sums over ranks in
        another order. Frozen parameters stay as the module was built.

        Raises:
            UserError: another model was trained, or the files are damaged.
        """
        path = directory / _FILE
        if not path.exists():
            raise UserError(
                f"cannot resume {self._name}: there is no {path}. The run that wrote the "
                "checkpoint trained no such model, or was of an older version; resume with its "
                "settings, or train the step anew with --overwrite"
            )
        state = json.loads(path.read_text())
        self._check(state, directory)
        with PartReader(directory, state["ranks"]) as saved:
            read_into(self._pieces, self._adamw, saved)
            for name, parameter in self._module.named_parameters():
                if parameter.requires_grad:
                    self._refresh(name, parameter, saved)
        forget_secondary_shards(self._engine.optimizer)
        for key, value in state["engine"].items():
            setattr(self._engine, key, value)
        return state["counts"]

    @torch.no_grad()
    def _refresh(self, name: str, parameter: nn.Parameter, saved: PartReader) -> None:
        """The parameter that the forward pass reads, which may be another tensor than the one the
        optimizer updates. ZeRO-3 keeps small ones whole besides their shards.
        """
        for part in local_parts(parameter):
            saved.fill(f"value/{name}", part)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for training to go on."""
        trained = {n: p for n, p in self._module.named_parameters() if p.requires_grad}
        return {
            "shapes": {n: list(getattr(p, "ds_shape", p.shape)) for n, p in trained.items()},
            "dtype": str(next(iter(trained.values())).dtype).removeprefix("torch."),
            "frozen_checksum": self._frozen,
        }

    def _check(self, saved: dict[str, Any], directory: Path) -> None:
        now = self._identity()
        differences = [
            *_differing_shapes(saved["shapes"], now["shapes"]),
            *(
                f"{what} was {saved[key]}, now it is {now[key]}"
                for key, what in (
                    ("dtype", "the parameters' dtype"),
                    ("frozen_checksum", "the checksum of the frozen weights"),
                )
                if saved[key] != now[key]
            ),
        ]
        if differences:
            raise UserError(
                f"cannot resume {self._name} from {directory}: {differences[0]}; resume with the "
                "settings and models of the interrupted run, or train the step anew with "
                "--overwrite"
            )


def forget_secondary_shards(optimizer: Any) -> None:
    """hpZ gathers from copies that a host keeps, which must go when values are written directly."""
    if hasattr(optimizer, "invalidate_secondary_tensor"):
        optimizer.invalidate_secondary_tensor()


def local_parts(parameter: Any) -> list[Part]:
    """What this rank holds of a parameter as the forward pass reads it: it, or its ZeRO-3 shard,
    and what of it is gathered at the moment.
    """
    parts = []
    if hasattr(parameter, "ds_tensor"):
        start, count = shard_of(parameter)
        parts.append(Part(start, parameter.ds_tensor.detach().view(-1)[:count]))
    if parameter.numel():
        parts.append(Part(0, parameter.detach().view(-1), everywhere=True))
    return parts


def _differing_shapes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """At most one sentence: the first parameter that differs."""
    for name in [*saved, *now]:
        if saved.get(name) == now.get(name):
            continue
        if name not in now:
            return [f"{name} was trained, and now is not"]
        if name not in saved:
            return [f"{name} was not trained, and now is"]
        return [f"{name} had the shape {saved[name]}, and now has {now[name]}"]
    return []
