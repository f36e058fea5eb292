"""``python -m tests.stages.kill_after STAGE LINES ARGUMENTS``: train, and die by SIGKILL as soon as
the stage has written so many lines of metrics.
"""

import os
import signal
import sys

from hybrid_engine import train_rlhf
from hybrid_engine.report.files import MetricsFile


def main() -> None:
    stage, lines = sys.argv[1], int(sys.argv[2])
    append = MetricsFile.append

    def append_and_die(self, record):
        append(self, record)
        if record["stage"] == stage and record["iteration"] == lines:
            os.kill(os.getpid(), signal.SIGKILL)

    MetricsFile.append = append_and_die
    train_rlhf.main(sys.argv[3:])


if __name__ == "__main__":
    main()
