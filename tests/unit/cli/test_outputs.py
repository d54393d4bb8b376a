"""A console or log that fails; each in a process of its own, whose descriptors are really closed or full."""

import logging
import os
import resource
import subprocess
import sys

import pytest

from smoe_train.cli.outputs import log_to, logger

PRINTING = """
import sys
from smoe_train.cli.outputs import keep_going_without_console
keep_going_without_console()
for _ in range(100):
    print("out" * 1000, flush=True)
    print("err" * 1000, file=sys.stderr)
    sys.stderr.flush()
from pathlib import Path
Path(sys.argv[1]).write_text("done")
"""


def run(target, redirection):
    command = f'"{sys.executable}" -c "$CODE" "{target}" {redirection}'
    return subprocess.run(["sh", "-c", command], env={**os.environ, "CODE": PRINTING}, timeout=60).returncode


@pytest.mark.parametrize("redirection", [">/dev/full 2>&1", ">&- 2>&-", "<&- >&- 2>&-"])
def test_an_output_that_takes_nothing_ends_nothing(tmp_path, redirection):
    if "full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full, a device without room")
    assert run(tmp_path / "reached", redirection) == 0
    assert (tmp_path / "reached").read_text() == "done", "and nothing that was meant for people"


def test_a_reader_that_goes_away_ends_nothing(tmp_path):
    assert run(tmp_path / "reached", f"2>&1 | head -c 10; test -f {tmp_path}/reached || sleep 5") == 0
    assert (tmp_path / "reached").read_text() == "done"


def test_what_is_printed_arrives_in_order(tmp_path):
    assert run(tmp_path / "reached", f">{tmp_path}/printed 2>&1") == 0
    assert (tmp_path / "printed").read_text() == ("out" * 1000 + "\n" + "err" * 1000 + "\n") * 100


@pytest.fixture
def own_handlers():
    before, level = list(logger.handlers), logger.level
    yield
    for handler in set(logger.handlers) - set(before):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(level)


@pytest.mark.usefixtures("own_handlers")
def test_a_log_that_cannot_be_opened_is_done_without(tmp_path, capsys):
    (tmp_path / "logs").write_text("in the way")
    log_to(tmp_path / "logs")
    assert "rank-0.log: cannot be written" in capsys.readouterr().err


@pytest.mark.usefixtures("own_handlers")
def test_a_log_without_room_is_said_once_and_goes_on_later(tmp_path, capsys):
    log_to(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    for number in range(10):
        logging.getLogger("smoe_train.test").info("lost %d", number)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    logging.getLogger("smoe_train.test").info("room again")
    err = capsys.readouterr().err
    assert err.count("cannot be written: File too large") == 1
    assert "Traceback" not in err
    assert "room again" in (tmp_path / "rank-0.log").read_text()
