"""``python -m hybrid_engine.train_rlhf``: from a pretrained model to your own chat model, in three
steps.

With no argument it runs the embedded default: a small real model, real data, on whatever this
machine has.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from hybrid_engine import cli, failures
from hybrid_engine.config import RunConfig
from hybrid_engine.distributed.exit import end_process
from hybrid_engine.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for; returns the process's exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        config = cli.parse(arguments)
        if config.num_gpus > 1 and not already_launched():
            from hybrid_engine.distributed.launch import launch

            return launch("hybrid_engine.train_rlhf", arguments, config.num_gpus)
        return run(config)
    except (UserError, KeyboardInterrupt) as error:
        return failures.report(error)


def run(config: RunConfig) -> int:
    """The steps in order, each from the files that the one before it left in the output
    directory. Returns the exit code.
    """
    from hybrid_engine import preflight
    from hybrid_engine.distributed import device, process_group
    from hybrid_engine.output import open_output
    from hybrid_engine.plan import give_back_freed, out_of_memory
    from hybrid_engine.stages import reward, rlhf, sft

    steps = {1: sft.train_sft, 2: reward.train_reward, 3: rlhf.train_rlhf}
    give_back_freed()
    device.use_device(config.model.device)
    process_group.initialise()
    log = plan = session = None
    try:
        with open_output(config) as session:
            log = session.reporter.log_path
            plan = preflight.check(session)
            if plan is not None:  # it decides what the settings leave to it
                session = replace(session, config=plan.decided(session.config))
            for step in config.steps:
                if session.finished(step):
                    session.reporter.note(f"step {step} is done already")
                else:
                    steps[step](session)
                    session.close_engines()
            session.reporter.print_summary()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        # Before this rank leaves the group: the others fail as soon as they notice.
        if plan is not None and session is not None:
            error = out_of_memory(error, plan, *session.reporter.failed_phase) or error
        return failures.report(error, log)


def already_launched() -> bool:
    from hybrid_engine.distributed.env import rank_env

    return rank_env().world_size > 1


if __name__ == "__main__":
    end_process(main())
