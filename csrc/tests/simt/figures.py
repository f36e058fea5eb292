"""Adds up what the SIMT programs found: the last line of ``ctest -L simt`` and ``-L sanitize``.

Every program writes its figures to the file that ``HYBRID_SIMT_FIGURES`` names (``harness.h``).
With ``--table docs/kernels.md`` the operators' rows there are held to them: how many results were
checked, and the worst relative error in each type to 10 %, since mathematical functions of another
C library differ in the last place.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

TYPES = ("fp32", "fp16", "bf16")
EXACT = "exact"  # equal bit for bit


@dataclass
class Figures:
    """Of one operator."""

    results: int = 0
    worst: dict[str, str] = field(default_factory=dict)  # type -> relative error, or EXACT

    def add(self, kind: str, results: int, worst: str) -> None:
        self.results += results
        before = self.worst.get(kind, worst)
        self.worst[kind] = worst if worst == EXACT else str(max(float(before), float(worst)))


@dataclass
class Programs:
    count: int = 0
    threads: int = 0
    failures: int = 0


def read_figures(folder: Path) -> tuple[dict[str, Figures], Programs]:
    operators: dict[str, Figures] = defaultdict(Figures)
    programs = Programs()
    for path in sorted(folder.glob("*.txt")):
        for line in path.read_text().splitlines():
            what, name, *rest = line.split("\t")
            if what == "program":
                programs.count += 1
                programs.failures += int(rest[0])
                programs.threads += int(rest[1])
            else:  # "results": the operator, a variant, the type
                words = name.split()
                kinds = (
                    [words[-1]] if words[-1] in TYPES else TYPES if rest[1] == EXACT else ["fp32"]
                )
                for kind in kinds:
                    operators[words[0]].add(kind, int(rest[0]) if kind == kinds[0] else 0, rest[1])
    return operators, programs


@dataclass(frozen=True)
class Row:
    """A row of the table: the operators whose figures it states, and the figures."""

    operators: tuple[str, ...]
    results: int
    worst: dict[str, str]

    def faults(self, operators: dict[str, Figures]) -> list[str]:
        found = [operators[name] for name in self.operators if name in operators]
        name = self.operators[0]
        if len(found) != 1:
            return [f"{name}: the row states results, and {len(found)} programs wrote any"]
        measured, faults = found[0], []
        if measured.results != self.results:
            faults.append(
                f"{name}: {measured.results} results checked, the row says {self.results}"
            )
        for kind in TYPES:
            said, is_ = self.worst[kind], measured.worst.get(kind, "")
            if not _agree(said, is_):
                faults.append(
                    f"{name}: worst {kind} error {is_ or 'unknown'}, the row says {said!r}"
                )
        return faults


def _agree(said: str, measured: str) -> bool:
    if EXACT in (said, measured) or not (said and measured):
        return said == measured
    return abs(float(said) - float(measured)) <= 0.1 * float(said)


def read_table(document: Path) -> list[Row]:
    """The rows of "Operators" whose second cell begins with a number."""
    section = document.read_text().split("\n## Operators\n")[1].split("\n## ")[0]
    rows = []
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) > 5 and (count := re.match(r"\d+", cells[1])):
            names = tuple(re.findall(r"`(\w+)`", cells[0].split(";")[0]))
            rows.append(Row(names, int(count[0]), dict(zip(TYPES, cells[2:5], strict=True))))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figures", type=Path, required=True, help="folder of the programs' files")
    parser.add_argument("--label", required=True, help="begins the last line")
    parser.add_argument("--table", type=Path, help="a document to hold to the figures")
    options = parser.parse_args()
    operators, programs = read_figures(options.figures)
    if programs.count == 0:
        sys.exit(f"{options.figures} has no figures: run the programs first")
    faults, held = [], ""
    if options.table:
        rows = read_table(options.table)
        faults = [fault for row in rows for fault in row.faults(operators)]
        stated = {name for row in rows for name in row.operators}
        faults += [f"{name}: no row in {options.table.name}" for name in set(operators) - stated]
        held = f", {len(rows)} rows of {options.table.name} compared, {len(faults)} differ"
    for fault in faults:
        print(fault)
    print(
        f"{options.label}: {programs.count} programs, {programs.threads} threads run, "
        f"{sum(figures.results for figures in operators.values())} results checked, "
        f"{programs.failures} failures{held}"
    )
    return 1 if faults or programs.failures else 0


if __name__ == "__main__":
    sys.exit(main())
