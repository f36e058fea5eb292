"""``python -m tests.stages.kill_after STAGE LINES ARGUMENTS``: train, and die by SIGKILL as soon as
the stage has written so many lines of metrics. Of several ranks, the first dies.
"""

import os
import signal
import sys

from hybrid_engine import train_rlhf
from hybrid_engine.distributed.exit import end_process
from hybrid_engine.distributed.launch import launch
from hybrid_engine.report.files import MetricsFile


def main() -> None:
    if "--num-gpus" in sys.argv and "RANK" not in os.environ:
        ranks = int(sys.argv[sys.argv.index("--num-gpus") + 1])
        sys.exit(launch("tests.stages.kill_after", sys.argv[1:], ranks))
    stage, lines = sys.argv[1], int(sys.argv[2])
    append = MetricsFile.append

    def append_and_die(self, record):
        append(self, record)
        if record["stage"] == stage and record["iteration"] == lines:
            os.kill(os.getpid(), signal.SIGKILL)

    MetricsFile.append = append_and_die
    end_process(train_rlhf.main(sys.argv[3:]))


if __name__ == "__main__":
    main()
