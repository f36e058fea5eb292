"""The output directory: what a run may do to what is already there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hybrid_engine.config import RunConfig
from hybrid_engine.distributed.collectives import barrier, broadcast_json, is_main
from hybrid_engine.errors import UserError
from hybrid_engine.report import Reporter
from hybrid_engine.run import STAGE_OF_STEP, Run
from hybrid_engine.yaml_config import to_yaml


@contextmanager
def open_output(config: RunConfig) -> Iterator[Run]:
    """Opens OUTPUT for a run, and refuses to train over something that is there.

    Raises:
        UserError: the directory cannot be written, or holds results or an unfinished step and
            neither --resume nor --overwrite says what to do with them.
    """
    output = Path(config.output_dir)
    with Reporter(output, main=is_main()) as reporter:
        run = Run(config, output, reporter)
        for step in config.steps:
            stage = STAGE_OF_STEP[step]
            if config.overwrite:
                discard(run, stage)
            elif not config.resume:
                refuse_leftovers(run, step)
        if is_main():
            settings = replace(
                config, resume=False, overwrite=False
            )  # what the run is, not how it began
            (output / "config.yaml").write_text(to_yaml(settings), encoding="utf-8")
        yield run


def refuse_leftovers(run: Run, step: int) -> None:
    stage = STAGE_OF_STEP[step]
    unfinished = broadcast_json((run.output / "checkpoints" / stage).exists())
    if unfinished or run.finished(step):
        what = "an unfinished" if unfinished else "a finished"
        raise UserError(
            f"{run.output} holds {what} step {step} ({stage}): --resume continues, --overwrite "
            "trains it anew, "
            "another --output-dir leaves it alone"
        )


def discard(run: Run, stage: str) -> None:
    """Forgets an earlier training of a stage; its models stay until the new ones replace them."""
    run.reporter.restart(stage)
    if is_main():
        shutil.rmtree(run.output / "checkpoints" / stage, ignore_errors=True)
    barrier("discard earlier results")
