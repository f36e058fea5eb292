"""The end of a process that took part in collectives."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn

_OUTPUT_LOST = 120  # what the interpreter itself says when it cannot flush


def end_process(code: int) -> NoReturn:
    """End this process with `code` once its exit handlers have run; no line after it is reached.

    Without finalising the interpreter. A thread of Gloo lets go of a collective's tensors after the
    collective's caller has gone on, and may need the GIL for it; CPython ends a thread that asks
    for the GIL while the interpreter is being finalised, and unwinding Gloo's frames for that
    aborts the process: work done, exit code 134. Joining Gloo's threads would need every holder of
    a process group to let it go, DeepSpeed's among them.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            code = code or _OUTPUT_LOST
    os._exit(code)
