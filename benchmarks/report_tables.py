"""Benchmarks as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.contest import OURS

Row = dict[str, Any]  # a benchmark of pytest-benchmark's JSON
PROVIDERS = ("native", "torch")


@dataclass(frozen=True)
class Section:
    """A part of the report: the benchmarks it is about, and their table."""

    name: str
    title: str
    explanation: str
    chosen: Callable[[Row], bool]
    render: Callable[[Sequence[Row]], str]

    def select(self, rows: Iterable[Row]) -> list[Row]:
        return [row for row in rows if self.chosen(row)]

    def table(self, rows: Iterable[Row]) -> str:
        """Empty if no benchmark is chosen."""
        selected = self.select(rows)
        return self.render(selected) if selected else ""


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join([*lines, ""])


def number(value: float | None) -> str:
    """Three significant digits; nothing for None."""
    if value is None:
        return ""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds / 1e-6)} us"


def kind(row: Row) -> Any:
    return row["extra_info"].get("kind")


def function(row: Row) -> str:
    return str(row["name"].partition("[")[0].removeprefix("bench_"))


def parameters(row: Row) -> str:
    return str(row["name"].partition("[")[2].removesuffix("]"))


def ratio(info: Row, name: str) -> str:
    return "" if name == OURS else times(info["speedup"][name])


def generate_rate(contender: Row, info: Row, phase: str) -> float:
    """Tokens a second of a phase: prompt tokens, new ones beyond the first, or all new ones."""
    tokens = {
        "prefill": info["prompt_tokens"],
        "decode": info["new_tokens"] - info["batch"],
        "whole": info["new_tokens"],
    }
    return float(tokens[phase] / contender["phase_seconds"][phase])


def generate_table(rows: Sequence[Row]) -> str:
    header = [
        "benchmark",
        "batch",
        "contender",
        "tok/s",
        "of limit",
        "prefill tok/s",
        "decode tok/s",
        "of limit",
        "limit",
        "we are faster: whole",
        "prefill",
        "decode",
    ]
    cells = []
    for row in rows:
        info = row["extra_info"]
        limit, mine = info["limit_tokens_per_second"], info["contenders"][OURS]
        for name in by_speed(info):
            theirs = info["contenders"][name]
            rates = {p: generate_rate(theirs, info, p) for p in ("whole", "prefill", "decode")}
            faster = {p: generate_rate(mine, info, p) / rate for p, rate in rates.items()}
            cells.append(
                [
                    function(row),
                    str(info["batch"]),
                    name,
                    number(rates["whole"]),
                    percent(rates["whole"] / limit),
                    number(rates["prefill"]),
                    number(rates["decode"]),
                    percent(rates["decode"] / limit),
                    number(limit),
                    *("" if name == OURS else times(value) for value in faster.values()),
                ]
            )
    return markdown(header, cells)


def by_speed(info: Row) -> list[str]:
    """Names of the contenders, ours first, then the fastest."""
    contenders = info["contenders"]
    return sorted(contenders, key=lambda c: (c != OURS, contenders[c]["median_seconds"]))


def rollout_table(rows: Sequence[Row]) -> str:
    header = ["benchmark", "contender", "s", "useful tok/s", "of limit", "GFLOP/s", "we are faster"]
    cells = []
    for row in rows:
        info = row["extra_info"]
        for name in by_speed(info):
            contender = info["contenders"][name]
            seconds, rate = contender["median_seconds"], contender["tokens_per_second"]
            cells.append(
                [
                    function(row),
                    name,
                    number(seconds),
                    number(rate),
                    percent(rate / info["limit_tokens_per_second"]),
                    number(info["flops"] / seconds / 1e9) if name == OURS else "",
                    ratio(info, name),
                ]
            )
    return markdown(header, cells)


def iteration_table(rows: Sequence[Row]) -> str:
    header = [
        "iteration",
        "contender",
        "s",
        "generate",
        "score",
        "train",
        "answer",
        "faster",
        "sgemm",
    ]
    cells = []
    for row in rows:
        info = row["extra_info"]
        for name in by_speed(info):
            contender = info["contenders"][name]
            phases = contender["phase_seconds"]
            answer = info.get("mean_answer", {}).get(name, contender["tokens"] / info["samples"])
            cells.append(
                [
                    info["iteration"],
                    name,
                    number(contender["median_seconds"]),
                    *(number(phases[phase]) for phase in ("generate", "score", "train")),
                    f"{answer:.1f}",
                    ratio(info, name),
                    percent(info["limit_seconds"] / contender["median_seconds"]),
                ]
            )
    return markdown(header, cells)


def kernel_table(rows: Sequence[Row]) -> str:
    header = [
        "kernel",
        "case",
        "median",
        "GB/s",
        "of read",
        "GFLOP/s",
        "of sgemm",
        "torch",
        "faster",
    ]
    cells = []
    for row in rows:
        if provider(row) == "torch":
            continue
        info, seconds = row["extra_info"], row["stats"]["median"]
        torch_seconds = torch_median(row, rows)
        cells.append(
            [
                function(row),
                case(row),
                duration(seconds),
                number(info.get("gb_per_s")),
                percent(info.get("fraction_of_read")),
                number(info.get("gflop_per_s")),
                percent(info.get("fraction_of_sgemm")),
                "" if torch_seconds is None else duration(torch_seconds),
                times(None if torch_seconds is None else torch_seconds / seconds),
            ]
        )
    return markdown(header, cells)


def provider(row: Row) -> str | None:
    return next((part for part in parameters(row).split("-") if part in PROVIDERS), None)


def case(row: Row) -> str:
    return "-".join(part for part in parameters(row).split("-") if part not in PROVIDERS)


def torch_median(row: Row, rows: Sequence[Row]) -> float | None:
    """Of the baseline timed with it, or of the benchmark that differs in the provider alone."""
    if "baseline_seconds" in row["extra_info"]:
        return float(row["extra_info"]["baseline_seconds"])
    if provider(row) is None:
        return None
    for other in rows:
        same = function(other) == function(row) and case(other) == case(row)
        if same and provider(other) == "torch":
            return float(other["stats"]["median"])
    return None


SECTIONS = (
    Section(
        "generate",
        "Generating: fixed lengths",
        "Prompts of 64 tokens, 64 new ones, temperature 1. Prefill is a call for one token; decode "
        "is what the whole call takes beyond it.",
        lambda row: kind(row) == "generate",
        generate_table,
    ),
    Section(
        "rollout",
        "Generating: skewed lengths, groups",
        "Skewed: 64 prompts of 64 tokens whose answers end at heavy-tailed lengths (mean 64, at "
        "most 256), 32 at once; transformers' batches are sorted by an oracle. Groups: 8 prompts "
        "of 256 tokens, 8 answers of 64 tokens to each. GFLOP/s count the work that is "
        "needed, each prompt once.",
        lambda row: kind(row) == "rollout",
        rollout_table,
    ),
    Section(
        "iteration",
        "A whole RLHF iteration",
        "Seconds; `sgemm` is what the needed products take at sgemm's rate, as a share of the "
        "iteration (forward passes, backward as two; no pass for old log-probabilities). `answer` "
        "is the mean length over the rounds.",
        lambda row: kind(row) == "iteration",
        iteration_table,
    ),
    Section(
        "kernels",
        "Kernels",
        "Against torch's best expression for the same. Bytes count each operand once.",
        lambda row: kind(row) is None,
        kernel_table,
    ),
)
