"""Whole jobs in miniature: parent, launcher and workers, all real processes; what ends them, and what is said of it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

import smoe_train
from smoe_train.cli.last_words import read_worker_errors, write_worker_error
from smoe_train.cli.supervise import RESTARTS_IN_VAIN, Ended, run_restarting

ROOT = Path(smoe_train.__file__).parents[1]

WORKER = """
import os, signal, sys, time
from pathlib import Path
from smoe_train.cli.last_words import write_worker_error
from smoe_train.cli.launcher import die_with_parent

die_with_parent()
logs, mode, rank = Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])

def stop(number, _frame):
    write_worker_error(logs, rank, 75, f"stopped by {signal.Signals(number).name}")
    sys.exit(75)

answer = {"deaf": signal.SIG_IGN, "loading": signal.SIG_DFL}.get(mode, stop)
signal.signal(signal.SIGTERM, answer)
signal.signal(signal.SIGINT, answer)
(logs / f"pid-{rank}.tmp").write_text(str(os.getpid()))
(logs / f"pid-{rank}.tmp").rename(logs / f"pid-{rank}")
if rank == 1 and mode in ("fail", "deaf-peer"):
    while not (logs / "pid-0").exists():
        time.sleep(0.01)
    write_worker_error(logs, rank, 3, "parity is off")
    sys.exit(3)
if rank == 1 and mode == "killed":
    while not (logs / "pid-0").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
if rank == 0 and mode == "deaf-peer":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode in ("stuck", "frozen", "vanished"):
    from functools import partial
    from smoe_train.training.watchdog import Watchdog

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    watchdog = Watchdog(logs, rank, 1.0, partial(write_worker_error, logs, rank, hung=True))
    watchdog.start()
    watchdog.beat("train")
    time.sleep(1.0)
    if rank == 1 and mode == "vanished":
        os._exit(0)  # as a launcher sees it: ended in order
    if rank == 1 and mode == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank == 1 or mode == "stuck":
        time.sleep(60)
    while True:
        watchdog.beat()
        time.sleep(0.1)
if mode != "ok":
    time.sleep(60)
"""

# What launchers do, without the two seconds that importing torch takes: pass signals on, any failure becomes 1.
FAKE_LAUNCHER = """
import os, signal, subprocess, sys, time

def main():
    workers = [
        subprocess.Popen([sys.executable, "-m", *sys.argv[1:]], env={**os.environ, "RANK": str(rank)})
        for rank in range(2)
    ]
    def forward(number, _frame):
        for worker in workers:
            worker.send_signal(number)
    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, forward)
    first = 0
    while any(worker.poll() is None for worker in workers):
        failed = [worker.returncode for worker in workers if worker.poll()]
        if failed and not first:
            first = failed[0]
            forward(signal.SIGTERM, None)
        time.sleep(0.02)
    failed = [worker.returncode for worker in workers if worker.returncode]
    first = first or (failed[0] if failed else 0)
    sys.exit(first if first < 0 else int(first > 0))
"""

PARENT = """
import json, os, sys
from pathlib import Path
from smoe_train.cli import launch, supervise

supervise.FAILURE_SECONDS = 0.5
launcher, logs, mode, limits = sys.argv[1:]
if launcher == "fake":
    command = [sys.executable, "-m", "fake_launcher", "worker_program", logs, mode]
else:
    plan = launch.plan_launch(launcher, 2, None, os.environ)
    command = launch.build_command(plan, "worker_program", [logs, mode])
limits = supervise.Limits(**json.loads(limits))
sys.exit(supervise.run_workers(command, launch.worker_environment(2, os.environ), Path(logs), limits))
"""


class Job:
    """A `smoe-train train` in miniature: parent, launcher and two workers, all real processes."""

    def __init__(self, folder: Path, launcher: str, mode: str, **limits: float) -> None:
        self.logs = folder / "logs"
        for name, text in (("worker_program", WORKER), ("fake_launcher", FAKE_LAUNCHER), ("parent", PARENT)):
            (folder / f"{name}.py").write_text(textwrap.dedent(text))
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"}
        for name in ("RANK", "WORLD_SIZE"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "parent.py"), launcher, str(self.logs), mode, json.dumps(limits)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    def pids(self) -> list[int]:
        """Waits until both workers are ready."""
        files = [self.logs / f"pid-{rank}" for rank in range(2)]
        wait_for(lambda: all(file.exists() for file in files))
        return [int(file.read_text()) for file in files]

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


def wait_for(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


# Whole jobs


def test_success_is_zero_and_old_error_files_go_away(tmp_path):
    write_worker_error(tmp_path / "logs", 7, 2, "from the run before")
    assert Job(tmp_path, "fake", "ok").end() == (0, "")
    assert not list((tmp_path / "logs").glob("*.error.json"))


def test_the_earliest_error_decides(tmp_path):
    code, errors = Job(tmp_path, "fake", "fail").end()  # rank 0 ends later, stopped by the launcher
    assert (code, errors) == (3, "parity is off\n")


def test_the_cause_comes_before_what_its_peers_lost(tmp_path):
    lost = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:41000"
    for rank, code, message in ((0, 1, lost), (1, 1, "a traceback"), (2, 75, "stopped")):
        write_worker_error(tmp_path, rank, code, message)
    assert [error.rank for error in read_worker_errors(tmp_path)] == [1, 2, 0]


def test_damaged_error_files_are_passed_over(tmp_path):
    (tmp_path / "rank-0.error.json").write_text('{"rank"')
    (tmp_path / "rank-1.error.json").write_text("[1]")
    write_worker_error(tmp_path, 2, 75, "stopped")
    assert [(error.rank, error.exit_code) for error in read_worker_errors(tmp_path)] == [(2, 75)]


def test_a_killed_worker_is_a_failure_although_its_peer_stopped_in_order(tmp_path):
    code, errors = Job(tmp_path, "fake", "killed").end()
    assert code == 137
    assert errors.startswith("error: a worker was killed by SIGKILL (lack of memory?); ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("sent", "seen"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGTERM"), ("SIGUSR1", "SIGTERM")]
)
def test_signals_reach_the_workers_and_75_comes_back(tmp_path, sent, seen):
    job = Job(tmp_path, "fake", "sleep")
    pids = job.pids()
    job.process.send_signal(signal.Signals[sent])
    assert job.end() == (75, f"stopped by {seen}\n")
    assert gone(pids)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGHUP"])
def test_workers_that_die_of_the_signal_that_was_sent_to_all_have_stopped(tmp_path, name):
    job = Job(tmp_path, "fake", "loading", ranks=2)
    pids = job.pids()
    job.process.send_signal(signal.Signals[name])
    for pid in pids:
        os.kill(pid, signal.Signals[name])
    assert job.end() == (75, f"stopped by {name} before the first step; the same command resumes the run\n")


def test_workers_that_nothing_is_known_of_are_not_called_resumable(tmp_path):
    job = Job(tmp_path, "fake", "loading")  # no heartbeats, as of `evaluate`
    job.pids()
    job.process.send_signal(signal.SIGINT)
    assert job.end() == (130, "stopped by SIGINT\n")


def test_a_second_signal_ends_workers_that_do_not_listen(tmp_path):
    job = Job(tmp_path, "fake", "deaf")
    pids = job.pids()
    job.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert job.process.poll() is None
    job.process.send_signal(signal.SIGINT)
    assert job.end()[0] == 128 + signal.SIGTERM
    assert gone(pids)


def test_a_peer_that_hangs_after_a_failure_is_ended(tmp_path):
    job = Job(tmp_path, "fake", "deaf-peer")
    pids = job.pids()
    assert job.end() == (3, "parity is off\n")
    assert gone(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal exists on Linux only")
@pytest.mark.parametrize("victim", ["parent", "launcher"])
def test_no_orphans_when_a_process_above_is_killed(tmp_path, victim):
    job = Job(tmp_path, "fake", "deaf")
    pids = job.pids()
    launcher = psutil.Process(pids[0]).ppid()
    os.kill(job.process.pid if victim == "parent" else launcher, signal.SIGKILL)
    code, _ = job.end()
    assert code == (-signal.SIGKILL if victim == "parent" else 137)
    wait_for(lambda: gone([*pids, launcher]), seconds=5)


def test_torchrun_for_real(tmp_path):
    job = Job(tmp_path, "torchrun", "sleep")
    pids = job.pids()
    job.process.send_signal(signal.SIGINT)
    assert job.end() == (75, "stopped by SIGINT\n")
    assert gone(pids)


def test_a_notice_to_every_process_does_not_end_the_launcher(tmp_path):
    job = Job(tmp_path, "fake", "sleep")
    pids = job.pids()
    os.kill(psutil.Process(pids[0]).ppid(), signal.SIGUSR1)
    time.sleep(0.3)
    job.process.send_signal(signal.SIGUSR1)
    assert job.end() == (75, "stopped by SIGTERM\n")


def test_deepspeed_launcher_for_real(tmp_path):
    job = Job(tmp_path, "deepspeed", "killed")
    code, errors = job.end()
    assert code == 137
    assert errors.splitlines()[-1].startswith("error: a worker was killed by SIGKILL (lack of memory?); ")


# Hangs and the grace time


def test_a_rank_without_progress_ends_the_run_with_all_stacks(tmp_path):
    job = Job(tmp_path, "fake", "stuck", ranks=2, hang_seconds=1.0)
    pids = job.pids()
    code, errors = job.end()
    assert code == 75
    for rank in range(2):
        assert f"rank {rank} (pid {pids[rank]}, " in errors
    assert errors.count("worker_program.py") >= 2
    assert "no progress for 1 s in phase train at step 0" in errors.splitlines()[-1]
    assert gone(pids)


def test_a_stopped_process_is_found_by_its_parent(tmp_path):
    job = Job(tmp_path, "fake", "frozen", ranks=2, hang_seconds=1.0)
    pids = job.pids()
    started = time.monotonic()
    code, errors = job.end()
    assert code == 75
    assert "rank 1 is stopped by a signal" in errors.splitlines()[-1]
    assert errors.count("worker_program.py") >= 2  # it was continued for its stacks
    assert time.monotonic() - started < 15
    assert gone(pids)


def test_a_rank_that_ends_without_a_word_ends_the_others(tmp_path):
    job = Job(tmp_path, "fake", "vanished", ranks=2)
    pids = job.pids()
    code, errors = job.end()
    assert (code, errors.count("\n")) == (1, 1)
    assert errors.startswith("error: rank 1 ended without a word")
    assert gone(pids)


def test_workers_have_the_grace_time_and_no_more(tmp_path):
    job = Job(tmp_path, "fake", "deaf", grace_seconds=0.7)
    pids = job.pids()
    job.process.send_signal(signal.SIGTERM)
    code, errors = job.end()
    assert code == 128 + signal.SIGTERM
    assert "no checkpoint within training.grace_seconds 0.7 of SIGTERM" in errors
    assert gone(pids)


# Restarts


class Attempts:
    """Workers that end as they are told, and the checkpoints they leave."""

    def __init__(self, *ends: tuple[Ended, int]) -> None:
        self.ends, self.restarts, self.step = list(ends), [], 0

    def __call__(self, received, restart):
        self.restarts.append(restart)
        ended, self.step = self.ends.pop(0)
        return ended

    def run(self, max_restarts: int) -> int:
        return run_restarting(self, max_restarts, lambda: self.step)


CRASH = Ended(1, "rank 1 failed", restart=True)


def test_failed_workers_are_started_again_from_their_newest_checkpoint(capsys):
    attempts = Attempts((CRASH, 4), (Ended(137, "killed", restart=True), 6), (Ended(0), 8))
    assert attempts.run(5) == 0
    assert attempts.restarts == [False, True, True]
    said = capsys.readouterr().err.splitlines()
    assert said[1] == "restart 1 of 5, from step 4"
    assert said[3] == "restart 2 of 5, from step 6"


@pytest.mark.parametrize("ended", [Ended(2, "typo"), Ended(3, "alarm"), Ended(75, "stopped")])
def test_mistakes_alarms_and_stops_are_no_reason_to_restart(ended):
    attempts = Attempts((ended, 0))
    assert attempts.run(5) == ended.code
    assert attempts.restarts == [False]


def test_restarts_are_counted(capsys):
    attempts = Attempts((CRASH, 1), (CRASH, 2), (CRASH, 3))
    assert attempts.run(2) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "gave up after 2 restarts (--max-restarts)"


def test_restarts_that_get_no_further_end(capsys):
    attempts = Attempts(*[(CRASH, 4)] * 9)
    assert attempts.run(100) == 1
    assert len(attempts.restarts) == 1 + RESTARTS_IN_VAIN
    assert "gave up: 3 restarts in a row got no further than step 4" in capsys.readouterr().err


def test_a_signal_between_attempts_ends_them():
    def attempt(received, restart):
        os.kill(os.getpid(), signal.SIGTERM)
        return CRASH

    assert run_restarting(attempt, 5, lambda: 0) == 1
