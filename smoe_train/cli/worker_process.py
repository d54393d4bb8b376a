"""Entry of a launched worker process, which is watched from its first moment, before torch is loaded."""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
from functools import partial
from pathlib import Path

from smoe_train.cli.last_words import LOGS, write_worker_error
from smoe_train.cli.launcher import die_with_parent
from smoe_train.cli.outputs import keep_going_without_console, log_to
from smoe_train.training.stop import StopRequest
from smoe_train.training.watchdog import Watchdog


def main() -> None:
    """Trains as one rank and ends the process."""
    die_with_parent()
    keep_going_without_console()
    faulthandler.enable()
    parser = argparse.ArgumentParser(prog="python -m smoe_train.cli.worker_process")
    parser.add_argument("--run-folder", type=Path, required=True)
    parser.add_argument("--resume", default="auto")
    parser.add_argument("--hang-seconds", type=float)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the end of a process that has nothing to save, without a traceback
    logs, rank = arguments.run_folder / LOGS, int(os.environ["RANK"])
    log_to(logs)
    watchdog = Watchdog(logs, rank, arguments.hang_seconds, partial(write_worker_error, logs, rank, hung=True))
    watchdog.start()

    from smoe_train.assembly import start_process
    from smoe_train.cli.worker import leave, run_worker, train_worker
    from smoe_train.recipe import RECIPE, load_recipe

    def work() -> None:
        process = start_process(load_recipe(str(arguments.run_folder / RECIPE), resolved=True))
        stop = StopRequest()
        stop.listen(second_ends=False)  # the parent kills on a second one; a scheduler may signal workers too
        train_worker(arguments.run_folder, arguments.resume, stop, process, watchdog)

    code = run_worker(work, logs)
    if code == 0:
        watchdog.close()
    leave(code)


if __name__ == "__main__":
    main()
