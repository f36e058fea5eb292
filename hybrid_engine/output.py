"""The output directory: what a run may do to what is already there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybrid_engine.config import RunConfig
from hybrid_engine.distributed.collectives import broadcast_json, is_main
from hybrid_engine.errors import UserError
from hybrid_engine.fields import flatten, settings
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
        if is_main() and (output / "config.yaml").is_file():
            note_earlier_run(run, output / "config.yaml")
        if is_main():
            # What the run is, not how it began.
            shown = replace(config, resume=False, overwrite=False)
            write_atomically(output / "config.yaml", to_yaml(shown).encode())
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


def note_earlier_run(run: Run, path: Path) -> None:
    """Compares the settings with those of the run that was in OUTPUT before, written at `path`."""
    try:
        before = flatten(from_yaml(path.read_text(encoding="utf-8"), str(path)))
    except UserError as error:
        if run.config.resume:
            raise
        run.reporter.warn(f"the settings of the earlier run cannot be read: {error}")
        return
    if run.config.resume:
        note_changes(run, before)
    else:
        note_other_models(run, before)


def note_other_models(run: Run, before: dict[str, Any]) -> None:
    """Warns where a model is named that later steps do not start from, since OUTPUT has its own."""
    now, defaults = flatten(run.config), flatten(RunConfig())
    for step, setting in ((1, "model.actor_model"), (2, "model.reward_model")):
        stage, named = STAGE_OF_STEP[step], now[setting]
        there = (run.output / stage).is_dir()
        if step in run.config.steps or step > max(run.config.steps) or not there:
            continue
        if named not in (before[setting], defaults[setting]):
            run.reporter.warn(
                f"{settings()[setting].option} {named} is not what step {max(run.config.steps)} "
                f"starts from: {run.output / stage} is there, made from "
                f"{before[setting] or run.output / 'sft'}; train step {step} anew, or give another "
                "--output-dir"
            )


def note_changes(run: Run, before: dict[str, Any]) -> None:
    """Warns of settings that a resumed run has changed: its numbers will not be the old run's."""
    for name, value in flatten(run.config).items():
        if name not in NOT_THE_RUN and before[name] != value:
            run.reporter.warn(f"resuming with another {name}: {value}, was {before[name]}")
