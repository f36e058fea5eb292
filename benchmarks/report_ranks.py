"""Benchmarks of several ranks as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report_tables import Row, Section, by_speed, kind, markdown, number, ratio, times


def ranks_table(rows: Sequence[Row]) -> str:
    header = ["ranks", "contender", "s", "tok/s", "its time over ours"]
    cells = []
    for row in rows:
        info = row["extra_info"]
        for name in by_speed(info):
            contender = info["contenders"][name]
            seconds, rate = contender["median_seconds"], contender["tokens_per_second"]
            cells.append(
                [str(info["ranks"]), name, number(seconds), number(rate), ratio(info, name)]
            )
    return markdown(header, cells)


def overlap_table(rows: Sequence[Row]) -> str:
    header = ["link s", "gather alone", "prefill alone", "longer", "sum", "together", "over longer"]
    cells = []
    for row in rows:
        info = row["extra_info"]
        seconds = info["seconds"]
        values = [
            info["link_seconds"],
            seconds["gather"],
            seconds["prefill"],
            info["maximum"],
            info["sum"],
            seconds["together"],
        ]
        cells.append([*map(number, values), times(info["over_maximum"])])
    return markdown(header, cells)


SECTIONS = (
    Section(
        "ranks",
        "Generating on several ranks",
        "The ranks share this machine's cores. Ours gathers ZeRO-3's shards once a rollout, while "
        "it prefills.",
        lambda row: kind(row) == "ranks",
        ranks_table,
    ),
    Section(
        "overlap",
        "Gathering while prefilling",
        "Every collective is delayed, so that the link takes so many seconds in all.",
        lambda row: kind(row) == "overlap",
        overlap_table,
    ),
)
