"""The output directory: what a run may do to what is already there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hybrid_engine.config import RunConfig
from hybrid_engine.distributed.collectives import broadcast_json, is_main
from hybrid_engine.errors import UserError
from hybrid_engine.fields import flatten
from hybrid_engine.report import Reporter
from hybrid_engine.report.files import write_atomically
from hybrid_engine.run import STAGE_OF_STEP, Run
from hybrid_engine.yaml_config import from_yaml, to_yaml

# Settings that change no number.
NOT_THE_RUN = ("steps", "output_dir", "resume", "overwrite", "num_gpus", "keep_checkpoints")


@contextmanager
def open_output(config: RunConfig) -> Iterator[Run]:
    """Opens OUTPUT for a run, and refuses to train over something that is there.

    Nothing of an earlier run is touched here: a step forgets it when its own training begins, after
    its data and models have been read.

    Raises:
        UserError: the directory cannot be written, or holds results or an unfinished step and
            neither --resume nor --overwrite says what to do with them.
    """
    output = Path(config.output_dir)
    with Reporter(output, main=is_main()) as reporter:
        run = Run(config, output, reporter)
        if not config.resume and not config.overwrite:
            for step in config.steps:
                refuse_leftovers(run, step)
        if config.resume and is_main():
            note_changes(run, output / "config.yaml")
        if is_main():
            # What the run is, not how it began.
            settings = replace(config, resume=False, overwrite=False)
            write_atomically(output / "config.yaml", to_yaml(settings).encode())
        yield run


def refuse_leftovers(run: Run, step: int) -> None:
    stage = STAGE_OF_STEP[step]
    unfinished = broadcast_json((run.output / "checkpoints" / stage).exists())
    if unfinished or run.finished(step):
        what = "an unfinished" if unfinished else "a finished"
        raise UserError(
            f"{run.output} holds {what} step {step} ({stage}): --resume continues, --overwrite "
            "trains it anew, another --output-dir leaves it alone"
        )


def note_changes(run: Run, path: Path) -> None:
    """Warns of settings that a resumed run has changed: its numbers will not be the old run's."""
    if not path.is_file():
        return
    before = flatten(from_yaml(path.read_text(encoding="utf-8"), str(path)))
    for name, value in flatten(run.config).items():
        if name not in NOT_THE_RUN and before[name] != value:
            run.reporter.warn(f"resuming with another {name}: {value}, was {before[name]}")
