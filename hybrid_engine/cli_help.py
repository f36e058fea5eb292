"""``--help``: every setting by section, with type, default and choices."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hybrid_engine.errors import UserError
from hybrid_engine.fields import Setting, sections, settings, suggest
from hybrid_engine.yaml_config import summary_line

USAGE = """\
usage: python -m hybrid_engine.train_rlhf [--config FILE] [--setting value ...]

From a pretrained model to your own chat model: supervised fine-tuning, reward model, PPO.
Without --config, --actor-model or --data-path it runs the embedded recipe 'demo'.

  --config FILE    settings from a YAML file or an embedded recipe; flags on the command line win
  --help [SECTION] this text, or one section of it: --help rlhf.kl

Dashes and underscores are the same. Lists are separated by spaces or commas (--steps 1 2,
--data-split 2,4,4).
A true/false setting is --name or --no-name. In YAML, dots are levels: rlhf: {kl: {coef: 0.05}}."""

TYPE_NAMES = {int: "INT", float: "NUMBER", str: "TEXT"}


def show_help(section: str = "", console: Console | None = None) -> None:
    """Prints the usage and all sections, or `section` and what lies below it."""
    console = console or Console(highlight=False)
    chosen = {name: cls for name, cls in sections().items() if in_section(name, section)}
    if not chosen:
        raise UserError(f"--help {section}: no such section{suggest(section, sections())}")
    if not section:
        console.print(Text(USAGE))
    for name, cls in chosen.items():
        console.print()
        console.print(Text(f"{name or 'run'}: {summary_line(cls)}", style="bold"))
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, style="cyan")
        table.add_column()
        for setting in settings().values():
            if setting.section == name:
                table.add_row("  " + usage(setting), Text(description(setting)))
        console.print(table)


def in_section(name: str, chosen: str) -> bool:
    chosen = chosen.replace("-", "_")
    return not chosen or name == chosen or name.startswith(chosen + ".")


def usage(setting: Setting) -> str:
    if setting.kind is bool:
        return setting.option
    return f"{setting.option} {TYPE_NAMES[setting.kind]}{' ...' if setting.many else ''}"


def description(setting: Setting) -> str:
    """The help with its default: a dotted name follows where a short flag hides it."""
    shown = " ".join(map(str, setting.default)) if setting.many else str(setting.default)
    notes = [
        f"default {shown.lower() if setting.kind is bool else shown}" if shown else "default empty"
    ]
    if setting.choices:
        notes.insert(0, "one of " + ", ".join(setting.choices))
    if setting.flag and setting.section:
        notes.append("YAML " + setting.path)
    return f"{setting.help} [{'; '.join(notes)}]"
