"""Run configurations as YAML: read with the line of every key at hand, written with every field and
its help.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from hybrid_engine.config import RunConfig
from hybrid_engine.errors import UserError
from hybrid_engine.fields import Setting, build, flatten, join, sections, settings, suggest

RECIPES = Path(__file__).parent / "recipes"


def to_yaml(config: RunConfig) -> str:
    """Every setting of `config`, with its help as a comment; :func:`from_yaml` reads back an equal
    one.
    """
    values = flatten(config)
    lines: list[str] = []
    for section, cls in sections().items():
        depth = section.count(".") + 1 if section else 0
        if section:
            lines.append(
                "  " * (depth - 1) + f"{section.rpartition('.')[2]}:  # {summary_line(cls)}"
            )
        own = (setting for setting in settings().values() if setting.section == section)
        lines += ["  " * depth + _entry(setting, values[setting.path]) for setting in own]
    return "\n".join(lines) + "\n"


def summary_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _entry(setting: Setting, value: Any) -> str:
    items = list(value) if setting.many else value
    # Characters such as U+0085 would be read back as line breaks; they are escaped instead.
    readable = "".join(map(str, items if setting.many else [items])).isprintable()
    text = yaml.safe_dump(
        items, default_flow_style=True, allow_unicode=readable, width=float("inf")
    )
    text = text.removesuffix("...\n").strip()  # the end mark that a bare scalar gets
    return f"{setting.name}: {text}  # {setting.help}"


def from_yaml(text: str, source: str = "config") -> RunConfig:
    """The configuration that `text` describes, over the defaults. `source` names it in errors."""
    return build(read_values(text, source))


def load_values(name: str) -> dict[str, Any]:
    """Dotted name -> value from a YAML file, or from an embedded recipe (a bare name such as
    'demo').
    """
    recipes = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    path = recipes.get(name, Path(name))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(
            f"--config {name}: {reason}; "
            f"give a YAML file or an embedded recipe ({', '.join(recipes)})"
        ) from None
    return read_values(text, str(path) if name not in recipes else f"recipe {name}")


def read_values(text: str, source: str) -> dict[str, Any]:
    """Dotted name -> coerced value of every key in `text`.

    Keys may nest (``rlhf: {kl: {coef: 0.1}}``) or be dotted (``rlhf.kl.coef: 0.1``); dashes count
    as underscores.

    Raises:
        UserError: with `source` and line for bad YAML, unknown or repeated keys, and values of the
        wrong type.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{source}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from None
    return dict(_read_mapping(root, "", source)) if root is not None else {}


def _read_mapping(node: yaml.Node, section: str, source: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(node, yaml.MappingNode):
        what = f"{section}: expected its settings" if section else "expected settings"
        raise UserError(f"{source}:{node.start_mark.line + 1}: {what} as 'name: value' lines")
    seen: set[str] = set()
    for key_node, value_node in node.value:
        where = f"{source}:{key_node.start_mark.line + 1}"
        path = join(section, str(key_node.value).replace("-", "_"))
        if path in seen:
            raise UserError(f"{where}: {path} is given twice; keep one")
        seen.add(path)
        if path in settings():
            yield path, settings()[path].coerce(_as_written(value_node), f"{where}: {path}")
        elif path in sections():
            yield from _read_mapping(value_node, path, source)
        else:
            raise UserError(
                f"{where}: unknown key {path!r}{suggest(path, [*settings(), *sections()])}"
            )


def _as_written(node: yaml.Node) -> Any:
    """A scalar's own text, a list of them, None for null. The setting knows its type better than
    YAML's guess at it.
    """
    if isinstance(node, yaml.SequenceNode):
        return [_as_written(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _as_written(value) for key, value in node.value}
    return None if node.tag == "tag:yaml.org,2002:null" else node.value
