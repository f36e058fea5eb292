"""A reward written by the user: a function in a Python file."""

from __future__ import annotations

import importlib.util
import inspect
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hybrid_engine.errors import UserError
from hybrid_engine.rewards.sample import Sample, checked_scores

STANDARD = ("prompts", "completions", "completion_ids")


class PythonReward:
    """``FILE.py:FUNCTION``, called as TRL calls reward functions.

    ``function(prompts, completions, completion_ids, **columns) -> list[float | None]``: lists with
    one entry a sample; ``columns`` are the data's other columns, None where a row lacks one. A
    function that does not take ``**columns`` gets only the arguments it names. Raises UserError for
    a file that does not load, an exception inside the function (with its line) and scores that are
    not one finite number or None a sample.
    """

    def __init__(self, spec: str) -> None:
        file, _, function = spec.rpartition(":")
        self.name = function
        self._source = repr(spec)
        self._file = Path(file).expanduser()
        self._function = self._find(load_file(self._file), function)
        self._accepted = accepted_arguments(self._function)

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        columns = {name: None for sample in samples for name in sample.extra}
        arguments: dict[str, list[Any]] = {
            name: [sample.extra.get(name) for sample in samples]
            for name in columns
            if name not in STANDARD
        }
        arguments["prompts"] = [sample.prompt for sample in samples]
        arguments["completions"] = [sample.answer for sample in samples]
        arguments["completion_ids"] = [sample.answer_tokens for sample in samples]
        if self._accepted is not None:
            arguments = {name: value for name, value in arguments.items() if name in self._accepted}
        try:
            scores = self._function(**arguments)
        except Exception as error:  # the user's code may raise anything
            raise UserError(
                f"reward {self._source} raised {described(error, self._file)}"
            ) from error
        return checked_scores(scores, samples, self._source)

    def _find(self, module: ModuleType, name: str) -> Callable[..., Any]:
        function = getattr(module, name, None)
        if callable(function):
            return function
        found = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and key[:1] != "_"
        ]
        raise UserError(
            f"reward {self._source}: {self._file} has no function {name!r} (found "
            f"{', '.join(found) or 'none'})"
        )


def load_file(path: Path) -> ModuleType:
    """Run a Python file as a module of its own."""
    if not path.is_file():
        raise UserError(
            f"reward file {path} does not exist; check the path (relative to {Path.cwd()})"
        )
    spec = importlib.util.spec_from_file_location(f"hybrid_engine_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        raise UserError(f"reward file {path} does not load: {described(error, path)}") from error
    return module


def accepted_arguments(function: Callable[..., Any]) -> set[str] | None:
    """Names of the arguments, or None when the function takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters}


def described(error: Exception, file: Path) -> str:
    """Type, text and the innermost line of the user's file."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == file
    ]
    place = f" at {file}:{lines[-1]}" if lines else ""
    return f"{type(error).__name__}: {error}{place}"
