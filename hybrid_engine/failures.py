"""How a run ends that went wrong: one line for whoever started it; the traceback is in run.log."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path

from hybrid_engine.errors import UserError

INTERNAL_ERROR, USER_ERROR, INTERRUPTED = 1, 2, 130

# What the machine refuses; everything else that the operating system reports is a bug of ours.
_REFUSALS = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.EFBIG: "raise the limit on file sizes",
    errno.EACCES: "give access to it",
    errno.EPERM: "give access to it",
    errno.EROFS: "make it writable",
    errno.EIO: "look at the disk",
    errno.EMFILE: "raise the limit on open files",
    errno.ENFILE: "raise the limit on open files",
}


def report(error: BaseException, log: Path | None = None) -> int:
    """Says on stderr what ended the run, and returns the exit code.

    Under our launcher the line goes to it, which shows the error that came first and no other.

    Args:
        log: the file that has the error's traceback; without one an unexpected error shows it.
    """
    if isinstance(error, KeyboardInterrupt):
        print("\ninterrupted; --resume continues from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    code, message = describe(error, log)
    if not left_for_launcher(message, code):
        print(message, file=sys.stderr, flush=True)
    return code


def describe(error: BaseException, log: Path | None) -> tuple[int, str]:
    """Exit code and text."""
    if isinstance(error, UserError):
        return USER_ERROR, f"error: {error}"
    refused = refusal(error)
    if refused is not None:
        place = getattr(error, "filename", None) or (log.parent if log else "the output directory")
        return USER_ERROR, (
            f"error: {place}: {os.strerror(refused)}; {_REFUSALS[refused]}, then --resume "
            "continues from the last checkpoint"
        )
    if log is not None and log.is_file():
        summary = " ".join(f"{type(error).__name__}: {error}".split())
        return INTERNAL_ERROR, f"internal error: {summary} (traceback in {log})"
    return INTERNAL_ERROR, "".join(traceback.format_exception(error)).rstrip()


def refusal(error: BaseException) -> int | None:
    """The errno of what the machine refused; torch and safetensors pass on its words alone."""
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return error.errno
    return next((code for code in _REFUSALS if os.strerror(code) in str(error)), None)


def left_for_launcher(message: str, code: int) -> bool:
    """Hands `message` to the launcher that started this process; false where there is none.

    A mistake in the command line comes before torch is imported, and then there is no launcher.
    """
    process_group = sys.modules.get("hybrid_engine.distributed.process_group")
    return process_group is not None and process_group.report_failure(message, code, complete=True)
