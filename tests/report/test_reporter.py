"""What a run shows and keeps: plain lines, captured warnings, samples, resuming, other ranks."""

import io
import json
import logging
import re
import sys
import warnings

import pytest
from rich.console import Console

from hybrid_engine.errors import UserError
from hybrid_engine.report import Reporter, print_summary
from hybrid_engine.report.clock import PhaseClock
from hybrid_engine.report.display import HEARTBEAT, LiveDisplay, PlainDisplay, make_display, render
from hybrid_engine.report.summary import rows
from hybrid_engine.report.text import duration, number, printable, sparkline
from hybrid_engine.report.view import StageView

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def log_lines(path):
    """run.log without the time of day."""
    return [line.split("  ", 1)[1] for line in (path / "run.log").read_text().splitlines()]


def run(report, iterations=3):
    with report.stage("rlhf", iterations):
        for iteration in range(1, iterations + 1):
            with report.phase("generate"):
                report.tick(1, 2, 10)
                report.tick(2, 2, 20)
            with report.phase("train"):
                report.tick(1, 1, 30)
            report.log("rlhf", iteration, {"reward": iteration / 7, "kl": 0.5, "actor_lr": 1e-5})


def test_plain_lines(tmp_path, capsys):
    with Reporter(tmp_path) as report:
        run(report, 12)
        report.note("done")
    shown = capsys.readouterr().out
    assert not CONTROL.search(shown)
    lines = shown.splitlines()
    assert len(lines) == 13
    assert lines[-1] == "done"
    assert re.match(
        r"rlhf    1/12  reward    0\.1429  kl       0\.5  lr  1\.00e-05  gen tok/s +\d+", lines[0]
    )
    assert len({line.index("kl") for line in lines[:12]}) == 1  # aligned
    assert log_lines(tmp_path) == lines  # nothing shown is missing from run.log


def test_metrics_have_stage_iteration_and_timings(tmp_path):
    with Reporter(tmp_path) as report:
        run(report, 2)
        assert report.lines == 2
    first, second = metrics(tmp_path)
    assert list(first)[:2] == ["stage", "iteration"]
    assert (second["stage"], second["iteration"], second["reward"]) == ("rlhf", 2, 2 / 7)
    assert {
        "gigabytes_generate",
        "gigabytes_train",
        "seconds_generate",
        "seconds_train",
        "tokens_per_second_generate",
        "tokens_per_second_train",
    } < set(first)


def test_stage_seconds_go_to_the_summary_of_a_finished_stage(tmp_path):
    with Reporter(tmp_path) as report:
        run(report)
        with pytest.raises(KeyError), report.stage("sft", 1):
            raise KeyError
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == {"rlhf"}
    assert set(summary["rlhf"]["phase_seconds"]) == {"generate", "train"}
    assert summary["rlhf"]["seconds"] >= sum(summary["rlhf"]["phase_seconds"].values())


def test_tokens_of_a_record_give_the_speed_of_training(tmp_path):
    with Reporter(tmp_path) as report, report.stage("sft", 1):
        with report.phase("train"):
            pass
        report.log("sft", 1, {"loss": 1.0, "tokens": 1000.0})
    (record,) = metrics(tmp_path)
    assert record["tokens_per_second_train"] == 1000.0 / record["seconds_train"]


def test_summary_can_be_read_on_every_rank(tmp_path):
    with Reporter(tmp_path) as report:
        assert report.summary() == {}
        report.summarize("sft", {"done": True})
    with Reporter(tmp_path, main=False) as report:
        assert report.summary() == {"sft": {"done": True}}


def test_stages_do_not_nest(tmp_path):
    with (
        Reporter(tmp_path) as report,
        report.stage("sft", 1),
        pytest.raises(RuntimeError, match="inside stage 'sft'"),
        report.stage("reward", 1),
    ):
        pass


def test_nan_is_shown_warned_about_and_valid_json(tmp_path, capsys):
    with Reporter(tmp_path) as report:
        report.log("sft", 1, {"loss": float("nan")})
        report.log("sft", 2, {"loss": float("nan")})
    assert [(record["loss"], record["nonfinite"]) for record in metrics(tmp_path)] == [
        (None, ["loss"])
    ] * 2
    shown = capsys.readouterr().out
    assert shown.count("warning: sft: loss is not finite") == 1
    assert "2 times: sft: loss is not finite" in shown


def test_samples_cannot_command_the_terminal(tmp_path, capsys):
    with Reporter(tmp_path) as report:
        report.sample("The \x1b[2Jfilm", "was\ngood\x07 \u202eé", 1.25, "iteration 3")
    shown = capsys.readouterr().out
    assert not CONTROL.search(shown)
    assert shown.splitlines() == [
        "sample: iteration 3, score 1.25",
        "  prompt: The \\x1b[2Jfilm",
        "  answer: was",
        "          good\\x07 \u202eé",
    ]
    assert log_lines(tmp_path) == shown.splitlines()


def test_long_samples_are_cut_on_the_screen_only(tmp_path, capsys):
    with Reporter(tmp_path) as report:
        report.sample("p", "x" * 5000)
    assert "[...]" in capsys.readouterr().out
    assert "x" * 5000 in (tmp_path / "run.log").read_text()


def test_warnings_and_logs_of_libraries_are_part_of_the_report(tmp_path, capsys):
    library = logging.Logger.manager.getLogger("some.library")
    own = logging.StreamHandler(sys.stderr)
    library.addHandler(own)
    library.propagate = False
    library.setLevel(logging.INFO)
    try:
        with Reporter(tmp_path) as report:
            late = logging.Logger.manager.getLogger("late.library")
            late.addHandler(logging.StreamHandler(sys.stdout))
            with report.stage("sft", 1):
                library.warning("slow %s", "path")
                library.warning("slow %s", "path")
                library.info("detail")
                late.warning("late")
                warnings.warn("careful", UserWarning, stacklevel=1)
        assert library.handlers == [own]
        assert library.propagate is False
    finally:
        library.removeHandler(own)
        late.handlers.clear()
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.count("warning: some.library: slow path") == 1
    assert shown.out.count("late.library: late") == 1
    assert "2 times: some.library: slow path" in shown.out
    assert re.search(r"test_reporter.py:\d+: UserWarning: careful", shown.out)
    assert "detail" not in shown.out
    assert "some.library: detail" in log_lines(tmp_path)


def test_capture_ends_with_the_report(tmp_path, capsys):
    before = warnings.showwarning, list(logging.getLogger().handlers)
    with Reporter(tmp_path):
        assert warnings.showwarning is not before[0]
    assert (warnings.showwarning, list(logging.getLogger().handlers)) == before


def test_an_error_leaves_its_traceback_in_the_log(tmp_path, capsys):
    with pytest.raises(ZeroDivisionError), Reporter(tmp_path):
        1 / 0  # noqa: B018
    assert any("Traceback" in line for line in log_lines(tmp_path))
    assert "Traceback" not in capsys.readouterr().out


def test_truncate_and_resume(tmp_path, capsys):
    with Reporter(tmp_path) as report:
        run(report, 3)
    with Reporter(tmp_path) as report:
        report.truncate(2)
        with report.stage("rlhf", 4, start=2):
            report.log("rlhf", 3, {"reward": 9.0})
        report.truncate(7)
    assert [(record["iteration"], record["reward"]) for record in metrics(tmp_path)] == [
        (1, 1 / 7),
        (2, 2 / 7),
        (3, 9.0),
    ]
    assert "metrics.jsonl has 3 lines, the checkpoint was taken after 7" in capsys.readouterr().out


def test_restart_forgets_one_stage(tmp_path):
    with Reporter(tmp_path) as report:
        run(report, 1)
        report.log("sft", 1, {"loss": 1.0})
        report.summarize("sft", {"heldout_loss_before": 1.0})
        report.restart("rlhf")
    assert [record["stage"] for record in metrics(tmp_path)] == ["sft"]
    assert set(json.loads((tmp_path / "summary.json").read_text())) == {"sft"}


def test_other_ranks_write_nothing_but_warnings(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with Reporter(tmp_path / "out", main=False) as report:
        run(report)
        report.note("note")
        report.sample("p", "a")
        report.summarize("rlhf", {"x": 1})
        report.truncate(0)
        report.restart("rlhf")
        report.print_summary()
        assert report.lines == 0
        report.warn("look")
        report.warn("look")
    assert not (tmp_path / "out").exists()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "rank 1: warning: look\n"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_output_directory_that_cannot_be(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output-dir .*; choose a writable directory"):
        Reporter(tmp_path / place)


def test_long_phase_gives_signs_of_life():
    now = [0.0]
    stream = io.StringIO()
    stream.isatty = lambda: False
    display = PlainDisplay(stream, now=lambda: now[0])
    view = StageView("rlhf", 9, 0, PhaseClock())
    view.phase_done, view.phase_total = 3, 8
    display.open(view)
    for _ in range(4):
        now[0] += HEARTBEAT / 2
        with view.clock.phase("generate"):
            display.tick()
    assert stream.getvalue().splitlines() == ["rlhf   0/9  generate 3/8"] * 2


def test_unencodable_characters_do_not_stop_a_run():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    PlainDisplay(stream).message("größe")
    assert raw.getvalue() == b"gr??e\n"


def test_terminal_gets_the_live_display(tmp_path):
    stream = io.StringIO()
    stream.isatty = lambda: True
    assert isinstance(make_display(stream), LiveDisplay)


def test_live_panel_shows_stage_phase_metrics_and_messages():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, color_system=None)
    display = LiveDisplay(console)
    view = StageView("rlhf", 20, 0, PhaseClock())
    display.open(view)
    for iteration in range(1, 6):
        view.record(iteration, {"reward": iteration * 0.5, "kl": None})
    display.message("warning: [red]not markup")
    display.sample("score 1", "The film ", "was")
    with view.clock.phase("generate"):
        view.phase_done, view.phase_total = 41, 64
        console.print(render(view))
    display.close()
    shown = stream.getvalue()
    for part in (
        "5/20",
        "41/64",
        "generate",
        "reward 2.5 ▁▃▅▆█",
        "kl -",
        "warning: [red]not markup",
        "The film was",
    ):
        assert part in shown


def test_time_left_counts_this_process_only():
    now = [0.0]
    view = StageView("sft", 10, 4, PhaseClock(lambda: now[0]))
    assert view.seconds_left() is None
    now[0] = 6.0
    view.record(6, {})
    assert view.seconds_left() == 12.0  # 2 iterations in 6 s, 4 are left


def test_lines_without_any_headline_show_something():
    assert "custom       1.5" in StageView("sft", 10, 0, PhaseClock()).line(3, {"custom": 1.5})


def test_summary_pairs_before_and_after():
    values = {
        "reward_before": -0.5,
        "reward_after": 1.25,
        "reward_se": 0.1,
        "kl": 3.2,
        "loss_before": None,
        "loss_after": 2.0,
        "alone_after": 7,
        "accuracy_before": 0.5,
        "accuracy": 0.75,
        "kl_se": 0.25,
        "lonely_before": 1,
        "lonely_se": 2,
        "done": True,
        "seconds": 75.2,
        "phase_seconds": {"train": 3661, "score": 0.52},
        "nonfinite": ["loss_before"],
    }
    assert list(rows(values)) == [
        ("reward", "-0.5", "1.25", "+1.75 ± 0.1"),
        ("kl", "", "3.2 ± 0.25", ""),
        ("loss", "-", "2", ""),
        ("alone_after", "", "7", ""),
        ("accuracy", "0.5", "0.75", "+0.25"),
        ("lonely_before", "", "1", ""),
        ("lonely_se", "", "2", ""),
        ("seconds", "", "1:15", ""),
        ("phase_seconds.train", "", "1:01:01", ""),
        ("phase_seconds.score", "", "0.5 s", ""),
        ("nonfinite", "", "loss_before", ""),
    ]


def test_summary_table_goes_to_screen_and_log(tmp_path, capsys):
    with Reporter(tmp_path) as report:
        report.summarize("reward", {"heldout_accuracy": 0.875})
        report.print_summary()
    shown = capsys.readouterr().out
    assert not CONTROL.search(shown)
    for text in (shown, (tmp_path / "run.log").read_text()):
        assert re.search(r"reward +heldout_accuracy +0\.875", text)


def test_empty_summary():
    console = Console(file=io.StringIO(), width=80)
    print_summary({}, console)
    print_summary({"sft": {}}, console)


@pytest.mark.parametrize(
    "value, text",
    [(None, "-"), (3, "3"), (123456, "123456"), (-0.00123456, "-0.001235"), (1234.5678, "1235"),
     (-1.2345e-5, "-1.23e-05"),
     (0.0, "0"), (2.5e9, "2.50e+09"), (True, "True"), ("a\nb", "a b"), (float("inf"), "inf")],
)  # fmt: skip
def test_number(value, text):
    assert number(value) == text


def test_duration_and_sparkline():
    assert [duration(value) for value in (None, 0.4, 59.6, 3600)] == [
        "-",
        "0:00",
        "1:00",
        "1:00:00",
    ]
    assert sparkline([0, 1, None, 7]) == "▁▂█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([1.0]) == ""


def test_printable_keeps_text_and_escapes_control_characters():
    assert printable("naïve 👩‍🚀\n\tx") == "naïve 👩‍🚀\n\tx"
    assert printable("\x1b[31m\r\x85\ud800") == "\\x1b[31m\\r\\x85\\ud800"
