"""From pytest-benchmark's JSON to the document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report

GENERATE = {
    "kind": "generate",
    "batch": 8,
    "prompt_tokens": 512,
    "new_tokens": 512,
    "limit_tokens_per_second": 400.0,
    "contenders": {
        "transformers (static cache)": {
            "tokens": 512,
            "median_seconds": 12.0,
            "tokens_per_second": 42.7,
            "phase_seconds": {"prefill": 2.0, "decode": 8.0, "whole": 10.0},
        },
        "hybrid_engine": {
            "tokens": 512,
            "median_seconds": 2.6,
            "tokens_per_second": 196.9,
            "phase_seconds": {"prefill": 0.5, "decode": 1.5, "whole": 2.0},
        },
    },
    "speedup": {"transformers (static cache)": 4.6},
}
ITERATION = {
    "kind": "iteration",
    "iteration": "PPO, fixed lengths",
    "samples": 16,
    "limit_seconds": 10.0,
    "contenders": {
        name: {
            "tokens": 512,
            "median_seconds": seconds,
            "tokens_per_second": 512 / seconds,
            "phase_seconds": {"generate": 0.2 * seconds, "score": 0.3 * seconds, "train": seconds},
        }
        for name, seconds in (("TRL 1.12.0", 40.0), ("hybrid_engine", 20.0))
    },
    "speedup": {"TRL 1.12.0": 2.0},
}


def benchmark(name: str, median: float, info: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "fullname": name, "stats": {"median": median}, "extra_info": info}


def results(*rows: dict[str, Any], isa: str = "avx2") -> dict[str, Any]:
    return {
        "machine_info": {
            "cpu": {"brand_raw": "Some CPU", "count": 2},
            "python_version": "3.11.7",
            "platform": "Linux",
            "versions": {"torch": "2.13.0"},
            "threads": 2,
            "isa": isa,
            "read_gb_per_s": 28.0,
            "sgemm_gflop_per_s": 134.0,
            "command": "pytest benchmarks/ --benchmark-only",
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": list(rows),
    }


KERNELS = (
    benchmark("bench_linear[64-head]", 0.002, {"gflop_per_s": 120.0, "baseline_seconds": 0.003}),
    benchmark("bench_gae[native]", 0.001, {"gb_per_s": 4.0}),
    benchmark("bench_gae[torch]", 0.004, {"gb_per_s": 1.0}),
)


def written(tmp_path: Path, *files: dict[str, Any], plots: bool = False) -> str:
    paths = []
    for number, data in enumerate(files):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps(data))
    output = tmp_path / "report.md"
    options = [] if plots else ["--no-plots"]
    report.main([*map(str, paths), "--output", str(output), *options])
    return output.read_text()


def row_of(text: str, *parts: str) -> list[str]:
    """Cells of the only table row that has all the parts."""
    lines = [
        line for line in text.splitlines() if line[0:1] == "|" and all(p in line for p in parts)
    ]
    assert len(lines) == 1, lines
    return [cell.strip() for cell in lines[0].strip("|").split("|")]


def test_generate_rates_and_ratios(tmp_path: Path) -> None:
    text = written(tmp_path, results(benchmark("bench_generate[8]", 2.6, GENERATE)))
    ours, theirs = row_of(text, "hybrid_engine"), row_of(text, "transformers (static cache)")
    # tok/s, of limit, prefill, decode (a token of each prompt came with the prefill), of limit
    assert ours[3:8] == ["256", "64 %", "1,024", "336", "84 %"]
    assert theirs[3:6] == ["51.2", "13 %", "256"]
    assert theirs[-3:] == ["5.00x", "4.00x", "5.33x"]


def test_iterations(tmp_path: Path) -> None:
    text = written(tmp_path, results(benchmark("bench_ppo", 20.0, ITERATION)))
    assert row_of(text, "TRL 1.12.0")[2:] == ["40", "8", "12", "40", "32.0", "2.00x", "25 %"]


def test_gather_overlap(tmp_path: Path) -> None:
    info = {
        "kind": "overlap",
        "link_seconds": 1.5,
        "seconds": {"gather": 2.0, "prefill": 1.0, "together": 2.2},
        "maximum": 2.0,
        "sum": 3.0,
        "over_maximum": 1.1,
    }
    text = written(tmp_path, results(benchmark("bench_gather_overlap[1.0]", 2.2, info)))
    assert row_of(text, "1.5") == ["1.5", "2", "1", "2", "3", "2.2", "1.10x"]


def test_kernels_are_compared_with_baseline_or_with_torchs_benchmark(
    tmp_path: Path,
) -> None:
    text = written(tmp_path, results(*KERNELS))
    assert row_of(text, "linear", "64-head")[-2:] == ["3 ms", "1.50x"]
    assert row_of(text, "| gae")[-2:] == ["4 ms", "4.00x"]


def test_hardware_versions_and_commands_are_stated(tmp_path: Path) -> None:
    text = written(tmp_path, results(*KERNELS))
    for part in (
        "Some CPU",
        "28.0 GB/s",
        "134.0",
        "torch 2.13.0",
        "pytest benchmarks/",
        "0123456789",
    ):
        assert part in text


def test_instruction_sets_have_sections_of_their_own_and_later_files_win(tmp_path: Path) -> None:
    old = results(benchmark("bench_linear[1]", 0.002, {"baseline_seconds": 0.004}))
    new = results(benchmark("bench_linear[1]", 0.001, {"baseline_seconds": 0.004}))
    other = results(benchmark("bench_linear[1]", 0.004, {"baseline_seconds": 0.004}), isa="avx512")
    text = written(tmp_path, old, other, new)
    avx2, avx512 = text.split("## AVX512")
    assert row_of(avx2, "linear")[-1] == "4.00x"
    assert row_of(avx512, "linear")[-1] == "1.00x"


def test_equal_results_give_equal_documents_and_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = results(
        benchmark("bench_generate[8]", 2.6, GENERATE),
        benchmark("bench_ppo", 20.0, ITERATION),
        *KERNELS,
    )
    first = written(tmp_path, data, plots=True)
    figures = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    assert set(figures) == {f"{name}-avx2.svg" for name in ("generate", "iteration", "kernels")}
    assert all(f"(report/{name})" in first for name in figures)
    assert written(tmp_path, data, plots=True) == first
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == figures


def test_a_figure_without_points_is_not_linked(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = results(benchmark("bench_merge[fp32]", 0.001, {"gb_per_s": 4.0}))
    text = written(tmp_path, rows, plots=True)
    assert "![" not in text
