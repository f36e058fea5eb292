"""Breaks the CUDA kernels on purpose, one place at a time, and checks that the tests notice.

A mutant removes one barrier, or one commit of or wait for asynchronous copies, or widens one bound
by one: a comparison, or the smaller of two lengths. All mutants of a file are compiled into the
same test programs, each behind a number that the environment variable ``SIMT_MUTANT`` picks, so
that a run costs a run and not a compilation. A mutant is caught when a test program fails with it,
built plainly, with AddressSanitizer and UndefinedBehaviorSanitizer, or with ThreadSanitizer.

A mutant that changes nothing is listed in ``equivalent_mutants.txt`` with the reason::

    csrc/norm/norm.cuh | the line, not indented | which of the mutants of such lines | reason

It went through all three when it was listed. That takes long, for only a program that fails ends
early; from then on it runs plainly, and with ``--thorough`` through all three again.

The last line says how many there are, how many are caught, and how many are listed. Exit code 1:
a mutant is neither caught nor listed, or a listed one is caught after all.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2]
SIMT = Path(__file__).resolve().parent
LISTED = Path(__file__).with_name("equivalent_mutants.txt")
QUICK_FIRST = ("gather", "linear", "lora", "rlhf", "activation", "norm", "attention_backward")
FLAGS = ("-std=c++20", "-O1", "-ffp-contract=off", "-w")
FLAVOURS = {
    "plain": (),
    "asan": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "tsan": ("-fsanitize=thread", "-DHYBRID_THREAD_SANITIZER"),
}
BARRIERS = re.compile(r"\b__sync(?:threads|warp)\(")
WAITS = re.compile(r"\b(?:__syncthreads|__syncwarp|cp_async_commit|cp_async_wait<\w+>)\([^;{}]*\);")
# Binary operators stand between spaces, template brackets do not: clang-format sees to it. A
# comparison with a fraction or with infinity compares values, not places; a halving that goes on at
# zero never ends.
BOUNDS = re.compile(r" (<|<=|>|>=) (?!-?[\d.]*\.\d|-?INFINITY|0; \w+ /= 2)")
SMALLER = re.compile(r"\bsmaller\(")
# Where a comparison is none that runs.
NOT_RUN = re.compile(r"\bconstexpr\b|\bstatic_assert\b|^\s*template\b|\boperator\s*[<>]|^\s*#")
CPU_SECONDS = 120  # for one run: more than twice what the slowest program takes


@dataclass(frozen=True)
class Mutant:
    """A broken line: its file relative to the repository, its text, and which of the mutants of
    lines with that text it is in the file."""

    number: int
    file: str
    line: int
    text: str
    place: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} #{self.place}: {self.text}"

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.file, self.text, self.place)


class Numbered:
    """Numbers for the mutants of a line, in the order in which they are asked for."""

    def __init__(self, first: int) -> None:
        self.first, self.count = first, 0

    def __call__(self) -> str:
        self.count += 1
        return f"simt_mutant({self.first + self.count - 1})"


def mutate(line: str, first: int) -> tuple[str, int]:
    """The line with every mutant behind its number, the first being ``first``; and their count.

    Widening lets a comparison hold for one more value: ``i < n`` becomes ``i < 1 + n``, and
    ``i >= n`` becomes ``i + 1 >= n``; ``smaller(a, b)`` becomes ``(1 + smaller(a, b))``.
    """
    code = line.split("//")[0]
    rest = line[len(code) :]
    number = Numbered(first)

    def widen(match: re.Match[str]) -> str:
        if match[1] in ("<", "<="):
            return f" {match[1]} {number()} + "
        return f" + {number()} {match[1]} "

    runs = NOT_RUN.search(code) is None
    code = WAITS.sub(lambda match: f"if (!{number()}) {match[0]}", code)
    if runs:
        code = _widen_smaller(BOUNDS.sub(widen, code), number)
    return code + rest, number.count


def _widen_smaller(code: str, number: Numbered) -> str:
    """Widens every ``smaller(...)`` that ends on the line, from the last to the first."""
    for match in reversed(list(SMALLER.finditer(code))):
        depth = 1
        for end in range(match.end(), len(code)):
            depth += (code[end] == "(") - (code[end] == ")")
            if depth == 0:
                call = code[match.start() : end + 1]
                code = f"{code[: match.start()]}({number()} + {call}){code[end + 1 :]}"
                break
    return code


def runs_on_the_host(lines: list[str]) -> list[bool]:
    """Of each line, whether the test programs have it: not what stands under ``__CUDACC__``."""
    kept, on_host = [], [True]
    for line in lines:
        if line.startswith("#if"):
            on_host.append(on_host[-1] and not line.startswith("#ifdef __CUDACC__"))
        elif line.startswith("#else"):
            on_host[-1] = on_host[-2] and not on_host[-1]
        elif line.startswith("#endif"):
            on_host.pop()
        kept.append(on_host[-1])
    return kept


def write_mutated_sources(build: Path) -> list[Mutant]:
    """Copies csrc into ``build`` with every kernel file mutated; returns the mutants."""
    tree = build / "csrc"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(CSRC, tree, ignore=shutil.ignore_patterns("*.cpp", "*.cu", "*.py", "*.csv"))
    for source in SIMT.glob("*.cpp"):
        shutil.copyfile(source, tree / "tests" / "simt" / source.name)
    mutants: list[Mutant] = []
    for path in sorted(tree.rglob("*.cuh")):
        lines = path.read_text().splitlines()
        seen: Counter[str] = Counter()
        on_host = runs_on_the_host(lines)
        for i, line in enumerate(lines):
            lines[i], count = mutate(line, len(mutants)) if on_host[i] else (line, 0)
            text, file = line.strip(), f"csrc/{path.relative_to(tree).as_posix()}"
            for _ in range(count):
                mutants.append(Mutant(len(mutants), file, i + 1, text, seen[text]))
                seen[text] += 1
        path.write_text("\n".join(lines) + "\n")
    (tree / "mutant.h").write_text(
        "#pragma once\n#include <cstdlib>\n"
        'inline const int simt_active = std::getenv("SIMT_MUTANT") ? '
        'std::atoi(std::getenv("SIMT_MUTANT")) : -1;\n'
        "inline int simt_mutant(int number) { return number == simt_active; }\n"
    )
    return mutants


def build_programs(
    build: Path, cxx: list[str], families: set[str], pool: ThreadPoolExecutor
) -> dict[tuple[str, str], Path]:
    """The test program of every (flavour, family)."""
    tree = build / "csrc"

    def compile_one(flavour: str, name: str, flags: tuple[str, ...]) -> Path:
        source, to = tree / "tests" / "simt" / f"{name}.cpp", build / f"{name}.{flavour}.o"
        command = [*cxx, *FLAGS, *flags, f"-I{tree}", "-c", str(source), "-o", str(to)]
        subprocess.run(command, check=True)
        return to

    runners, tests = {}, {}
    for flavour, flags in FLAVOURS.items():
        runner_flags = flags[1:] if flavour == "tsan" else flags  # see CMakeLists.txt
        runners[flavour] = [
            pool.submit(compile_one, flavour, name, runner_flags) for name in ("fiber", "runner")
        ]
        test_flags = (*flags, "-include", "mutant.h")
        for family in families:
            tests[flavour, family] = pool.submit(compile_one, flavour, f"{family}_test", test_flags)
    programs = {}
    for (flavour, family), test in tests.items():
        objects = [str(job.result()) for job in (test, *runners[flavour])]
        programs[flavour, family] = build / f"{family}.{flavour}"
        link = [*cxx, *FLAVOURS[flavour][:1], *objects, "-o", str(programs[flavour, family])]
        subprocess.run(link, check=True)
    return programs


def passes(program: Path, mutant: int, orders: str = "all") -> bool:
    """Whether the test program ends well with this mutant (-1 for none)."""
    environment = {
        **os.environ,
        "SIMT_MUTANT": str(mutant),
        "HYBRID_TEST_FAIL_FAST": "1",
        "HYBRID_SIMT_ORDERS": orders,
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    limited = f'ulimit -t {CPU_SECONDS}; exec "$0"'
    run = subprocess.run(["sh", "-c", limited, str(program)], env=environment, capture_output=True)
    return run.returncode == 0


@functools.cache
def included_by(family: str) -> frozenset[str]:
    """The files that a test program includes, however deep, relative to the repository."""
    seen, new = set(), {SIMT / f"{family}_test.cpp"}
    while new:
        seen |= new
        names = {
            name
            for path in new
            for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)
        }
        new = {CSRC / name for name in names} - seen
    return frozenset(path.relative_to(CSRC.parent).as_posix() for path in seen)


@functools.cache
def all_families() -> list[str]:
    """The test programs, those first that take the least time."""
    found = (path.name.removesuffix("_test.cpp") for path in SIMT.glob("*_test.cpp"))
    order = {name: i for i, name in enumerate(QUICK_FIRST)}
    return sorted(set(found) - {"runner"}, key=lambda name: (order.get(name, len(order)), name))


def families_of(mutant: Mutant) -> list[str]:
    """The test programs that have it."""
    return [family for family in all_families() if mutant.file in included_by(family)]


def caught_by(
    mutant: Mutant, programs: dict[tuple[str, str], Path], plainly: bool = False
) -> str | None:
    """The first flavour that fails, or None; the likelier and the quicker come first.

    A missing barrier is a race, which may show in one order of threads only; all else shows in any.
    """
    unordered = BARRIERS.search(mutant.text) is not None
    orders = "all" if unordered else "one"
    flavours = ("plain", "tsan", "asan") if unordered else ("plain", "asan", "tsan")
    for flavour in flavours[:1] if plainly else flavours:
        for family in families_of(mutant):
            if not passes(programs[flavour, family], mutant.number, orders):
                return flavour
    return None


def listed_equivalents() -> dict[tuple[str, str, int], str]:
    """The mutants that change nothing, with the reasons."""
    listed = {}
    for line in LISTED.read_text().splitlines():
        if line and not line.startswith("#"):
            file, text, place, reason = (part.strip() for part in line.split(" | "))
            listed[file, text, int(place)] = reason
    return listed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, required=True, help="folder for what is compiled")
    parser.add_argument("--cxx", default="g++", help="the compiler, with its launcher if any")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="programs at once"
    )
    parser.add_argument("--only", default="", help="only those that match this regular expression")
    parser.add_argument(
        "--thorough", action="store_true", help="the listed ones under the sanitizers as well"
    )
    options = parser.parse_args()
    options.build.mkdir(parents=True, exist_ok=True)
    mutants = [m for m in write_mutated_sources(options.build) if re.search(options.only, str(m))]
    families = {family for mutant in mutants for family in families_of(mutant)}
    with ThreadPoolExecutor(options.jobs) as pool:
        programs = build_programs(options.build, shlex.split(options.cxx), families, pool)
        good = pool.map(lambda program: passes(program, -1), programs.values())
        for program, ends_well in zip(programs.values(), good, strict=True):
            if not ends_well:
                sys.exit(f"{program} fails without any mutant")
        listed = listed_equivalents()
        plainly = [mutant.key in listed and not options.thorough for mutant in mutants]
        verdicts = pool.map(
            lambda mutant, plain: caught_by(mutant, programs, plain), mutants, plainly
        )
        return report(mutants, verdicts, listed)


def report(
    mutants: list[Mutant],
    verdicts: Iterable[str | None],
    listed: Mapping[tuple[str, str, int], str],
) -> int:
    """Prints what is wrong as it comes, and the figure; returns the exit code."""
    caught, equivalent, wrong = 0, 0, 0
    for mutant, flavour in zip(mutants, verdicts, strict=True):
        if flavour is None and mutant.key in listed:
            equivalent += 1
        elif flavour is None:
            wrong += 1
            print(f"SURVIVED {mutant}", flush=True)
        else:
            caught += 1
            if mutant.key in listed:
                wrong += 1
                print(f"LISTED AS EQUIVALENT, but caught ({flavour}) {mutant}", flush=True)
    print(f"mutants: {len(mutants)}, caught {caught}, equivalent {equivalent}, unexplained {wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
