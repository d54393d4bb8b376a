"""A thin skin around a launcher: ``python -m smoe_train.cli.launcher MODULE ARGUMENTS`` calls ``MODULE.main()``.

It dies with its parent and keeps the launcher's traceback off the terminal, where it would bury the workers' own
message.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence

LAUNCHER_PID = "SMOE_TRAIN_LAUNCHER_PID"
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Makes the kernel kill this process when its parent ends; does nothing outside Linux.

    Without it, workers whose launcher was killed train on unseen. To be called first in a worker.
    """
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    expected = os.environ.get(LAUNCHER_PID)
    if expected is not None and expected != str(os.getppid()):
        os.kill(os.getpid(), signal.SIGKILL)  # the parent ended before the request was in place


def _main(module: str, arguments: Sequence[str]) -> int:
    """Runs ``module.main()``; returns 128 + signal if a worker was ended by one, else the launcher's exit code."""
    if signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
        # A scheduler that signals every process of a job must not end the one that waits for the workers to save. They
        # inherit what is ignored, but no handler.
        signal.signal(signal.SIGUSR1, lambda *_: None)
    die_with_parent()
    os.environ[LAUNCHER_PID] = str(os.getpid())
    sys.argv = [module, *arguments]
    logging.disable(logging.ERROR)  # what matters is raised; the rest names every process that is stopped
    killed_by = 0
    try:
        if "--standalone" in arguments:
            from smoe_train.parallel.rendezvous import keep_torchrun_local

            keep_torchrun_local()
        importlib.import_module(module).main()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as stop:
        if not isinstance(stop.code, int) or stop.code >= 0:
            raise
        killed_by = -stop.code  # DeepSpeed's launcher
    except Exception as error:
        if type(error).__name__ == "ChildFailedError":
            # A worker that was killed is the cause, even if one that lost its connection ended a moment earlier.
            failures = error.failures.values()  # type: ignore[attr-defined]
            killed_by = max([-one.exitcode for one in failures if one.exitcode != -signal.SIGTERM], default=0)
        elif type(error).__name__ != "SignalException":  # which torchrun raises once it has stopped the workers
            raise
        if killed_by <= 0:
            return 1
    else:
        return 0
    return 128 + killed_by


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], sys.argv[2:]))
