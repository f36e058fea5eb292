"""metrics.jsonl and summary.json: valid JSON whatever the values and whenever the process dies."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from hybrid_engine.errors import UserError
from hybrid_engine.report.files import MetricsFile, SummaryFile, write_atomically
from hybrid_engine.report.text import finite

ROOT = Path(__file__).resolve().parents[2]
NAN, INF = float("nan"), float("inf")


def strict(text: str):
    """Parses JSON without the NaN that Python would let pass."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def records(path):
    return [strict(line) for line in path.read_text().splitlines()]


def test_non_finite_values_become_null_and_are_named():
    values = {
        "loss": NAN,
        "kl": -INF,
        "reward": 1.5,
        "parts": {"a": INF, "b": 2},
        "list": [1.0, NAN],
    }
    assert finite(values) == {
        "loss": None,
        "kl": None,
        "reward": 1.5,
        "parts": {"a": None, "b": 2},
        "list": [1.0, None],
        "nonfinite": ["loss", "kl", "parts.a", "list[1]"],
    }
    assert finite({"loss": 1.0}) == {"loss": 1.0}


def test_tensors_and_arrays_are_numbers():
    values = {
        "t": torch.tensor(1.5),
        "i": torch.tensor(3),
        "v": torch.tensor([1, 2]),
        "n": numpy.float32(0.5),
    }
    assert finite(values) == {"t": 1.5, "i": 3, "v": [1, 2], "n": 0.5}
    assert finite({"t": torch.tensor(NAN)}) == {"t": None, "nonfinite": ["t"]}


def test_lines_append_across_openings(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for iteration in range(3):
        metrics = MetricsFile(path)
        assert metrics.lines == iteration
        metrics.append({"iteration": iteration, "loss": NAN, "text": "é\n\x00"})
        metrics.close()
    assert [record["iteration"] for record in records(path)] == [0, 1, 2]
    assert records(path)[0]["text"] == "é\n\x00"


def test_incomplete_last_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1}\n{"itera')
    metrics = MetricsFile(path)
    metrics.append({"iteration": 2})
    assert [record["iteration"] for record in records(path)] == [1, 2]


@pytest.mark.parametrize("kept", [0, 2, 5, 9])
def test_truncate(tmp_path, kept):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for iteration in range(5):
        metrics.append({"iteration": iteration, "text": "ü" * iteration})
    metrics.truncate(kept)
    assert metrics.lines == min(kept, 5)
    metrics.append({"iteration": 99})
    expected = [*range(min(kept, 5)), 99]
    assert [record["iteration"] for record in records(metrics.path)] == expected


def test_drop_removes_one_stage_and_appending_goes_on(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for stage in ("sft", "reward", "sft", "rlhf"):
        metrics.append({"stage": stage})
    metrics.drop("sft")
    metrics.append({"stage": "sft"})
    assert [record["stage"] for record in records(metrics.path)] == ["reward", "rlhf", "sft"]
    assert metrics.lines == 3


def test_metrics_are_whole_after_kill(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = f"""
from pathlib import Path
from hybrid_engine.report.files import MetricsFile
metrics = MetricsFile(Path({str(path)!r}))
iteration = 0
while True:
    metrics.append({{"iteration": iteration, "values": list(range(200))}})
    iteration += 1
    if iteration == 50:
        print("ready", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    MetricsFile(path).close()  # drops a line cut by the kernel in the middle of a write, if any
    iterations = [record["iteration"] for record in records(path)]
    assert len(iterations) >= 50
    assert iterations == list(range(len(iterations)))


def test_summary_merges_by_stage(tmp_path):
    summary = SummaryFile(tmp_path / "summary.json")
    summary.merge("sft", {"before": 3.0})
    summary.merge("reward", {"accuracy": 0.5})
    summary.merge("sft", {"after": 2.0})
    assert strict(summary.path.read_text()) == {
        "sft": {"before": 3.0, "after": 2.0},
        "reward": {"accuracy": 0.5},
    }
    summary.drop("sft")
    summary.drop("absent")
    assert summary.read() == {"reward": {"accuracy": 0.5}}


def test_summary_forgets_that_a_mended_value_was_not_finite(tmp_path):
    summary = SummaryFile(tmp_path / "summary.json")
    summary.merge("rlhf", {"kl": NAN, "reward": INF})
    assert summary.read()["rlhf"] == {"kl": None, "reward": None, "nonfinite": ["kl", "reward"]}
    summary.merge("rlhf", {"kl": 1.0})
    assert summary.read()["rlhf"] == {"kl": 1.0, "reward": None, "nonfinite": ["reward"]}
    summary.merge("rlhf", {"reward": 2.0})
    assert summary.read()["rlhf"] == {"kl": 1.0, "reward": 2.0}


def test_damaged_summary_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "summary.json"
    for content in ("{", "[]"):
        path.write_text(content)
        with pytest.raises(UserError, match="summary.json"):
            SummaryFile(path).merge("sft", {"a": 1})
        assert path.read_text() == content


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_written_file_is_readable_by_others(tmp_path):
    write_atomically(tmp_path / "summary.json", b"{}")
    assert stat.S_IMODE((tmp_path / "summary.json").stat().st_mode) == 0o644
