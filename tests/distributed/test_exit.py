"""The end of a rank: everything is said and done, and the interpreter is not finalised."""

import os
import subprocess
import sys

import pytest

from tests.distributed.ranks import ROOT

SCRIPT = """
import atexit, sys
from hybrid_engine.distributed.exit import end_process

class SeesFinalisation:
    def __del__(self):
        print("finalised", flush=True)

witness = SeesFinalisation()
atexit.register(print, "handler")
print("work")
end_process(int(sys.argv[1]))
print("after")
"""


def end(code, **streams):
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(code)],
        cwd=ROOT,
        env={**buffered, "PYTHONPATH": str(ROOT)},
        text=True,
        **streams,
    )


@pytest.mark.parametrize("code", [0, 3])
def test_handlers_run_and_output_is_flushed(code):
    done = end(code, capture_output=True)
    assert done.returncode == code
    assert done.stdout == "work\nhandler\n"
    assert done.stderr == ""


@pytest.mark.parametrize("code, expected", [(0, 120), (3, 3)])
def test_lost_output_is_no_success(code, expected):
    with open("/dev/full", "w") as full:
        assert end(code, stdout=full, stderr=subprocess.PIPE).returncode == expected
