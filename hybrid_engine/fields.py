"""The settings of :class:`RunConfig` by dotted name: their types, and the way from text or YAML
values to a checked config.

Both the command line and YAML files are read through this list, so a field added to a config class
is reachable from both.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from hybrid_engine.config import RunConfig
from hybrid_engine.errors import UserError

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Setting:
    """One field of the configuration."""

    path: str  # "rlhf.kl.coef"
    kind: type  # int, float, bool or str; of the items where `many`
    many: bool  # a tuple: any number of items
    default: Any
    help: str
    flag: str | None  # short flag, such as "--actor-model"
    choices: tuple[str, ...] | None
    within: str  # interval of its values, "" for any

    @property
    def section(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def option(self) -> str:
        """How the command line calls it: the short flag if there is one, else the dotted name with
        dashes.
        """
        return self.flag or "--" + self.path.replace("_", "-")

    def coerce(self, value: Any, where: str) -> Any:
        """`value` as the field's type: text, or a list of texts; a text for a list is split at its
        commas.

        Raises:
            UserError: `where` (file and line, or flag), what was expected and what was there.
        """
        if not self.many:
            return self._coerce_item(value, where)
        if isinstance(value, str):
            value = [item.strip() for item in value.split(",") if item.strip()]
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(self._coerce_item(item, where) for item in items)

    def _coerce_item(self, value: Any, where: str) -> Any:
        try:
            converted = convert(value, self.kind)
        except (TypeError, ValueError):
            expected = (
                f"a list, each item {EXPECTED[self.kind]}" if self.many else EXPECTED[self.kind]
            )
            got = "nothing" if value is None else repr(value)
            raise UserError(f"{where}: expected {expected}, got {got}") from None
        if self.choices and converted not in self.choices:
            near = suggest(converted, self.choices)
            raise UserError(f"{where}: {converted!r} is not one of {', '.join(self.choices)}{near}")
        return converted


def convert(value: Any, kind: type) -> Any:
    """The text `value` as `kind`. Raises TypeError or ValueError."""
    if not isinstance(value, str):
        raise TypeError
    if kind is bool:
        if value.lower() not in TRUE + FALSE:
            raise ValueError
        return value.lower() in TRUE
    converted = kind(value)
    if kind is float and not math.isfinite(converted):
        raise ValueError
    return converted


@cache
def sections() -> dict[str, type]:
    """Dotted name -> config class, in the order of declaration; the run itself is ''."""
    return dict(_walk_sections(RunConfig, ""))


def _walk_sections(cls: Any, path: str) -> Iterable[tuple[str, type]]:
    yield path, cls
    for name, hint in get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _walk_sections(hint, join(path, name))


@cache
def settings() -> dict[str, Setting]:
    """Dotted name -> setting, for every field of every section."""
    found = {}
    for section, cls in sections().items():
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if not dataclasses.is_dataclass(hints[field.name]):
                setting = _setting(join(section, field.name), field, hints[field.name])
                found[setting.path] = setting
    return found


def _setting(path: str, field: dataclasses.Field, hint: Any) -> Setting:
    many = get_origin(hint) is tuple
    kind = get_args(hint)[0] if many else hint
    return Setting(path, kind, many, field.default, **field.metadata)


def build(values: Mapping[str, Any], cls: Any = RunConfig, section: str = "") -> Any:
    """The configuration with `values` (dotted name -> value of the field's type) over the defaults.

    Raises:
        UserError: what the config classes refuse, with the section it concerns.
    """
    arguments = {}
    for name, hint in get_type_hints(cls).items():
        path = join(section, name)
        if dataclasses.is_dataclass(hint):
            arguments[name] = build(values, hint, path)
        elif path in values:
            arguments[name] = values[path]
    try:
        return cls(**arguments)
    except UserError as error:
        known = not section or section in str(error)
        raise UserError(str(error) if known else f"{section}: {error}") from None


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted name -> value; the inverse of :func:`build`."""
    values = {}
    for path in settings():
        value: Any = config
        for part in path.split("."):
            value = getattr(value, part)
        values[path] = value
    return values


def suggest(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' with the known names nearest to `name`, or ''.

    A name given without its section ('learning_rate') suggests every full name that ends in it.
    """
    known = list(known)
    tail = name.lstrip("-")
    ending = [other for other in known if other.endswith("." + tail)]
    by_tail = {other.rpartition(".")[2].lstrip("-"): other for other in reversed(known)}
    near = (
        ending
        or difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        or [
            by_tail[match]
            for match in difflib.get_close_matches(
                tail.rpartition(".")[2], by_tail, n=1, cutoff=0.7
            )
        ]
    )
    if not near:
        return ""
    return f"; did you mean {' or '.join(near[:4])}?"


def join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name
