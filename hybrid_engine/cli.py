"""The command line of a run, generated from the config classes.

Precedence: flags over the YAML file of ``--config`` over the defaults in
:mod:`hybrid_engine.config`. Every field answers to its dotted name (``--rlhf.kl.coef``), a few to a
short flag as well. Nothing here imports torch: help and mistakes are instant.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hybrid_engine.cli_help import show_help
from hybrid_engine.config import RunConfig
from hybrid_engine.errors import UserError
from hybrid_engine.fields import Setting, build, settings, suggest
from hybrid_engine.yaml_config import from_yaml, load_values, to_yaml

__all__ = ["from_yaml", "parse", "to_yaml"]

DEFAULT_RECIPE = "demo"
# Naming a model, data or a file means: my run, not the demonstration.
OWN_RUN = ("model.actor_model", "data.path")
# DeepSpeed's launcher appends it; the environment says the same.
LAUNCHER_OPTIONS = ("--local_rank", "--local-rank")


def announce(text: str) -> None:
    """Prints `text`, once where several ranks parse the same command line."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(text, flush=True)


def parse(argv: Sequence[str], say: Callable[[str], None] = announce) -> RunConfig:
    """The configuration of a run from its command-line arguments (without the program's name).

    `say` receives one line where the embedded recipe is chosen. ``--help [SECTION]`` prints and
    exits with status 0.

    Raises:
        UserError: unknown names (with the nearest known one), wrong types, values that the config
        classes refuse.
    """
    arguments = split_arguments(argv)
    for option, values in arguments:
        if option in ("-h", "--help"):
            show_help(values[0] if values else "")
            raise SystemExit(0)
    recipe, flags = read_arguments(arguments)
    if recipe is None and flags.get("resume"):
        recipe = interrupted_run(flags)
    if recipe is None and not any(path in flags for path in OWN_RUN):
        recipe = DEFAULT_RECIPE
        say(f"No --config, --actor-model or --data-path: running the embedded recipe '{recipe}'.")
    return build({**(load_values(recipe) if recipe else {}), **flags})


def interrupted_run(flags: dict[str, Any]) -> str | None:
    """The settings that the run being resumed wrote down, if it got that far."""
    path = Path(flags.get("output_dir", RunConfig.output_dir)) / "config.yaml"
    return str(path) if path.is_file() else None


def split_arguments(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """``--a 1 2 --b=3`` -> [("--a", ["1", "2"]), ("--b", ["3"])]. A negative number is a value, not
    an option.
    """
    arguments: list[tuple[str, list[str]]] = []
    for token in argv:
        if token.startswith("--") or (token[:1] == "-" and token[1:2].isalpha()):
            option, equals, value = token.partition("=")
            arguments.append((option, [value] if equals else []))
        elif arguments:
            arguments[-1][1].append(token)
        else:
            raise UserError(
                f"unexpected argument {token!r}; settings are given as --name value (see --help)"
            )
    return arguments


def read_arguments(arguments: list[tuple[str, list[str]]]) -> tuple[str | None, dict[str, Any]]:
    """(value of --config, dotted name -> coerced value) of split arguments."""
    recipe: str | None = None
    flags: dict[str, Any] = {}
    for option, values in arguments:
        if option == "--config":
            recipe = only(
                option, values, recipe is not None, "a YAML file or the name of an embedded recipe"
            )
            continue
        if option in LAUNCHER_OPTIONS:
            continue
        setting, negated = find_option(option)
        if setting.path in flags:
            raise UserError(
                f"{option}: {setting.path} is given twice; give it once, with all its values"
            )
        flags[setting.path] = False if negated else read_value(setting, option, values)
        if negated and values:
            raise UserError(f"{option}: takes no value, got {' '.join(values)!r}")
    return recipe, flags


def read_value(setting: Setting, option: str, values: list[str]) -> Any:
    if setting.many and values:
        items = [item.strip() for value in values for item in value.split(",")]
        return setting.coerce([item for item in items if item], option)
    if setting.kind is bool and not values:
        return True
    expected = "one or more values" if setting.many else "one value"
    return setting.coerce(only(option, values, False, expected), option)


def only(option: str, values: list[str], repeated: bool, expected: str) -> str:
    if repeated or len(values) != 1:
        given = f"{len(values)}: {' '.join(values)}" if values else "nothing"
        got = "it twice" if repeated else given
        raise UserError(f"{option}: expected {expected}, got {got}")
    return values[0]


def find_option(option: str) -> tuple[Setting, bool]:
    """The setting behind `option`, and whether it is the --no- form of a true/false setting."""
    name = option.replace("_", "-")
    found = option_names().get(name)
    if found is None:
        shown = [setting.option for setting in settings().values()] + ["--config", "--help"]
        raise UserError(f"unknown option {option}{suggest(name, shown)} (--help lists all)")
    return found


@cache
def option_names() -> dict[str, tuple[Setting, bool]]:
    """Every spelling with dashes -> (setting, negated)."""
    names = {}
    for setting in settings().values():
        for option in {setting.option, "--" + setting.path.replace("_", "-")}:
            names[option] = (setting, False)
            if setting.kind is bool:
                names["--no-" + option[2:]] = (setting, True)
    return names
