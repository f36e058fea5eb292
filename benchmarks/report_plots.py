"""The report's figures, as SVG. Each draws into a file, or says that there is nothing to draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report_tables import (
    Row,
    by_speed,
    case,
    function,
    generate_rate,
    provider,
    torch_median,
)

PHASES = ("generate", "score", "train")


def save(figure: Any, path: Path) -> None:
    """Without a date, and with stable ids: equal results give equal files."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "hybrid-engine"}):
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


def axes(count: int, width: float, height: float) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def generate(rows: Sequence[Row], path: Path) -> bool:
    """Tokens a second over the batch, one panel a model; the limit as a dashed line."""
    names = list(dict.fromkeys(function(row) for row in rows))
    figure, panels = axes(len(names), 5.0, 3.6)
    for panel, name in zip(panels, names, strict=True):
        chosen = sorted(
            (row for row in rows if function(row) == name), key=lambda r: r["extra_info"]["batch"]
        )
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in chosen:
            info = row["extra_info"]
            lines.setdefault("limit", []).append((info["batch"], info["limit_tokens_per_second"]))
            for contender in by_speed(info):
                rate = generate_rate(info["contenders"][contender], info, "whole")
                label = contender.partition(" (")[0]
                lines.setdefault(label, []).append((info["batch"], rate))
        for label, points in lines.items():
            style = {"linestyle": "--", "color": "0.5"} if label == "limit" else {"marker": "o"}
            panel.plot(*zip(*points, strict=True), label=label, **style)
        panel.set(title=name, xlabel="batch", ylabel="tokens/s", xscale="log", yscale="log")
        ticks = [row["extra_info"]["batch"] for row in chosen]
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    save(figure, path)
    return True


def iteration(rows: Sequence[Row], path: Path) -> bool:
    """Seconds of the phases, stacked."""
    figure, panels = axes(len(rows), 4.2, 3.4)
    for panel, row in zip(panels, rows, strict=True):
        info = row["extra_info"]
        names = by_speed(info)
        bottom = [0.0] * len(names)
        for phase in PHASES:
            heights = [info["contenders"][name]["phase_seconds"][phase] for name in names]
            panel.bar(names, heights, bottom=bottom, label=phase, width=0.6)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        panel.axhline(info["limit_seconds"], linestyle="--", color="0.5", label="at sgemm's rate")
        panel.set(title=info["iteration"], ylabel="s")
        panel.legend(fontsize=8)
    save(figure, path)
    return True


def rollout(rows: Sequence[Row], path: Path) -> bool:
    """Useful tokens a second."""
    figure, panels = axes(len(rows), 4.2, 3.0)
    for panel, row in zip(panels, rows, strict=True):
        contenders = row["extra_info"]["contenders"]
        names = by_speed(row["extra_info"])
        labels = [name.replace(" (", "\n(") for name in names]
        panel.bar(labels, [contenders[name]["tokens_per_second"] for name in names], width=0.5)
        panel.set(title=function(row), ylabel="useful tokens/s")
        panel.tick_params(axis="x", labelsize=7)
    save(figure, path)
    return True


def kernels(rows: Sequence[Row], path: Path) -> bool:
    """How much faster than torch, case by case."""
    points = []
    for row in rows:
        other = None if provider(row) == "torch" else torch_median(row, rows)
        if other is not None:
            points.append((f"{function(row)} {case(row)}", other / row["stats"]["median"]))
    if not points:
        return False
    figure, (panel,) = axes(1, 7.0, 0.6 + 0.16 * len(points))
    labels, values = zip(*reversed(points), strict=True)
    colours = ["tab:blue" if value >= 1 else "tab:red" for value in values]
    panel.barh(labels, values, color=colours)
    panel.axvline(1.0, color="0.3", linewidth=0.8)
    panel.set(xscale="log", xlabel="times as fast as torch")
    panel.tick_params(axis="y", labelsize=6)
    panel.margins(y=0.005)
    save(figure, path)
    return True


FIGURES: dict[str, Callable[[Sequence[Row], Path], bool]] = {
    "generate": generate,
    "rollout": rollout,
    "iteration": iteration,
    "kernels": kernels,
}
