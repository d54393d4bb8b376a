"""What ends a hung process, in real processes: the watchdog ends the one that it is in."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smoe_train.training.stop import STARTED, StopRequest
from smoe_train.training.watchdog import Heartbeat, Watchdog, heartbeat_path, patience, stacks_path

PROGRAM = """
import os, signal, sys, threading, time
from pathlib import Path
from smoe_train.training.stop import StopRequest
from smoe_train.training.watchdog import Watchdog

def leave_word(code, message):
    print(f"{code} {message}", file=sys.stderr, flush=True)

stop = StopRequest()
watchdog = Watchdog(Path(sys.argv[1]), 0, 1.0, leave_word, alone="alone" in sys.argv)
watchdog.step = lambda: 7
watchdog.start()
watchdog.beat("train")
"""


def run(logs: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", STARTED)}
    command = [sys.executable, "-c", PROGRAM + program, str(logs), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_a_process_without_progress_writes_its_stacks_and_ends(tmp_path):
    done = run(tmp_path, "def stuck(): time.sleep(60)\nstuck()")
    assert done.returncode == 75
    assert "75 no progress for 1 s in phase train at step 7" in done.stderr
    assert "in stuck" in stacks_path(tmp_path, 0).read_text()
    assert Heartbeat.read(heartbeat_path(tmp_path, 0)).phase == "train"


def test_without_a_parent_the_stacks_are_printed(tmp_path):
    done = run(tmp_path, "def stuck(): time.sleep(60)\nstuck()", "alone")
    assert done.returncode == 75
    assert "in stuck" in done.stderr


def test_signs_of_life_and_phases_that_may_be_quiet_end_nothing(tmp_path):
    program = (
        "for _ in range(25): time.sleep(0.1); watchdog.beat()\nwatchdog.beat('end')\ntime.sleep(2)\nwatchdog.close()"
    )
    done = run(tmp_path, program)
    assert (done.returncode, done.stderr) == (0, "")
    assert Heartbeat.read(heartbeat_path(tmp_path, 0)).phase == "done"
    assert patience(1.0, "start") > 60 > patience(1.0, "train") == 1.0


def test_time_in_which_the_process_was_stopped_does_not_count(tmp_path):
    """As after Ctrl-Z and fg: the process was not hung, it was not there."""
    program = "print('ready', flush=True)\nfor _ in range(60): time.sleep(0.05); watchdog.beat()\nos._exit(0)"
    process = subprocess.Popen([sys.executable, "-c", PROGRAM + program, str(tmp_path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(timeout=60) == 0
    process.stdout.close()


def test_a_stop_that_takes_longer_than_its_grace_is_cut_off(tmp_path):
    program = (
        "stop.listen(second_ends=True)\nwatchdog.end_after(stop, 1.0)\nos.kill(os.getpid(), signal.SIGTERM)\n"
        "while True: time.sleep(0.1); watchdog.beat()"
    )
    done = run(tmp_path, program, "alone")
    assert done.returncode == 128 + signal.SIGTERM
    assert "no checkpoint within training.grace_seconds 1 of SIGTERM" in done.stderr


def test_a_heartbeat_that_is_being_written_is_no_heartbeat(tmp_path):
    path = tmp_path / "rank-0.heartbeat"
    assert Heartbeat.read(path) is None
    path.write_text('{"pid": 1, "ti')
    assert Heartbeat.read(path) is None
    path.write_text(json.dumps({"pid": 1, "ticks": 2, "beats": 3, "phase": "train", "step": 4}).ljust(256))
    assert Heartbeat.read(path) == Heartbeat(1, 2, 3, "train", 4)


def test_a_full_disk_under_the_heartbeat_hurts_nobody(tmp_path):
    watchdog = Watchdog(tmp_path, 0, None, lambda code, message: None)
    os.close(watchdog._file)
    watchdog._file = os.open("/dev/full", os.O_WRONLY)
    with watchdog:
        watchdog.beat("train")


@pytest.mark.parametrize("clock_jump", [-86400.0, 86400.0])
def test_the_time_limit_is_of_the_monotonic_clock(monkeypatch, clock_jump):
    now = time.time()
    stop = StopRequest(time.monotonic() - 5.0)
    stop.limit(None)
    assert not stop.requested
    stop.limit(60.0)
    monkeypatch.setattr(time, "time", lambda: now + clock_jump)
    assert not stop.requested
    stop.limit(5.0)
    assert stop.requested
    assert stop.reason == "since training.max_seconds 5 are over"


def test_workers_share_the_start_of_their_command(monkeypatch):
    monkeypatch.setenv(STARTED, str(time.monotonic() - 100.0))
    stop = StopRequest()
    stop.limit(99.0)
    assert stop.requested
