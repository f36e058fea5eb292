"""Planned against measured peaks of training, net of the process itself: within 10 % of resident
memory, and in one process of the counters of torch's profiler too. (Under ZeRO it counts a bucket
of 80 MB that DeepSpeed takes whole, and so small a model does not fill.)
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.ranks import results_of
from tests.plan.measured import SHAPES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc"
    ),
]


@pytest.mark.parametrize("variant", ["all", "checkpointing", "lora"])
@pytest.mark.parametrize("family", SHAPES)
def test_a_training_step_takes_what_was_planned(family: str, variant: str) -> None:
    command = [sys.executable, "-m", "tests.plan.measured", family, variant, "0"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    print(family, variant, figures)
    assert figures["measured"] > 40e6  # so that the noise of a process does not count
    for how in ("measured", "profiled"):
        assert figures["planned"] == pytest.approx(figures[how], rel=0.1), how


@pytest.mark.multi_process
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_and_so_it_does_on_two_ranks(stage: int, tmp_path: Path) -> None:
    (tmp_path / "what").write_text(f"llama all {stage}")
    for figures in results_of("tests.plan.measured:on_ranks", 2, tmp_path):
        print(stage, figures)
        assert figures["planned"] == pytest.approx(figures["measured"], rel=0.1)
