"""``python -m hybrid_engine.plan``: the memory of a run, before it is started, from the same
arguments as ``train_rlhf``. No weights are read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hybrid_engine import cli, failures
from hybrid_engine.errors import UserError

FITS, DOES_NOT_FIT = 0, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the plan; returns 0 where it fits, 3 where it does not, 2 for a mistake."""
    try:
        config = cli.parse(list(sys.argv[1:] if argv is None else argv))
        from hybrid_engine.distributed.device import use_device
        from hybrid_engine.plan.planner import NOT_PLANNED, plan_run

        use_device(config.model.device)
        plan = plan_run(config, ranks=max(config.num_gpus, 1))
        if plan is None:
            raise UserError(f"nothing can be planned: {NOT_PLANNED}")
        for line in plan.lines():
            print(line)
        if plan.impossible or plan.tight:
            print(plan.complaint())
            return DOES_NOT_FIT
        print("fits")
        return FITS
    except (UserError, KeyboardInterrupt) as error:
        return failures.report(error)


if __name__ == "__main__":
    sys.exit(main())
