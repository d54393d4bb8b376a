"""The command line in this process: what it prints and how it ends."""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from support.tiny import tiny_recipe

from smoe_train.cli.app import main


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def smoe_train(*arguments: object, report: bool = False) -> Outcome:
    """Runs ``smoe-train`` with these arguments, as the console script does.

    Drawing the report is most of a tiny run's time; it is left out unless asked for.
    """
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    drawing = contextlib.nullcontext() if report else mock.patch("smoe_train.cli.worker.write_report")
    with drawing, _undone(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = ["smoe-train", *map(str, arguments)]
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        finally:
            sys.argv = before
    return Outcome(code, out.getvalue(), err.getvalue())


def write_recipe(folder: Path, text: Path, **sections: object) -> Path:
    """Writes a tiny recipe of one process and fp32, named ``tiny``."""
    path = folder / "tiny.yaml"
    path.write_text(tiny_recipe(text, 1, **{"parallel": {"engine": "local"}, **sections}).to_yaml(), encoding="utf-8")
    return path


@contextlib.contextmanager
def _undone() -> Iterator[None]:
    """Puts back signal handlers and log files, which a process of its own would take along."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    logger = logging.getLogger("smoe_train")
    handlers, level = list(logger.handlers), logger.level
    try:
        yield
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)
        for handler in set(logger.handlers) - set(handlers):
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(level)
