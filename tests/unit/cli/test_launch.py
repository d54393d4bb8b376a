import base64
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

import smoe_train
from smoe_train.cli import launch
from smoe_train.cli.launch import LaunchPlan, build_command, plan_launch, read_hostfile, worker_environment
from smoe_train.errors import LaunchError

ROOT = Path(smoe_train.__file__).parents[1]

WORKER = """
import os, signal, sys, time
from pathlib import Path
from smoe_train.cli.launch import die_with_parent, write_worker_error

die_with_parent()
logs, mode, rank = Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])

def stop(number, _frame):
    write_worker_error(logs, rank, 75, f"stopped by {signal.Signals(number).name}")
    sys.exit(75)

signal.signal(signal.SIGTERM, stop if mode != "deaf" else signal.SIG_IGN)
signal.signal(signal.SIGINT, stop if mode != "deaf" else signal.SIG_IGN)
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
import os, sys
from pathlib import Path
from smoe_train.cli import launch

launch.FAILURE_SECONDS = 0.5
launcher, logs, mode = sys.argv[1:]
if launcher == "fake":
    command = [sys.executable, "-m", "fake_launcher", "worker_program", logs, mode]
else:
    plan = launch.plan_launch(launcher, 2, None, os.environ)
    command = launch.build_command(plan, "worker_program", [logs, mode])
sys.exit(launch.run_workers(command, launch.worker_environment(2, os.environ), Path(logs)))
"""


class Job:
    """A `smoe-train train` in miniature: parent, launcher and two workers, all real processes."""

    def __init__(self, folder: Path, launcher: str, mode: str) -> None:
        self.logs = folder / "logs"
        for name, text in (("worker_program", WORKER), ("fake_launcher", FAKE_LAUNCHER), ("parent", PARENT)):
            (folder / f"{name}.py").write_text(textwrap.dedent(text))
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"}
        for name in ("RANK", "WORLD_SIZE"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "parent.py"), launcher, str(self.logs), mode],
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


# The plan and the command


@pytest.mark.parametrize(
    ("launcher", "nproc", "expected"),
    [
        ("auto", None, LaunchPlan("in_process", 1)),
        ("auto", 1, LaunchPlan("in_process", 1)),
        ("auto", 2, LaunchPlan("torchrun", 2)),
        ("torchrun", 1, LaunchPlan("torchrun", 1)),
        ("in_process", 1, LaunchPlan("in_process", 1)),
    ],
)
def test_auto_takes_the_simplest_launcher(launcher, nproc, expected):
    assert plan_launch(launcher, nproc, None, {}) == expected


@pytest.mark.parametrize(
    ("launcher", "nproc", "environ", "message"),
    [
        ("mpirun", 2, {}, "allowed: auto, torchrun, deepspeed, in_process"),
        ("auto", 0, {}, "give 1 or more"),
        ("in_process", 2, {}, "use --launcher torchrun"),
        ("deepspeed", 3, {"CUDA_VISIBLE_DEVICES": "4,5"}, "CUDA_VISIBLE_DEVICES=4,5 has only 2"),
    ],
)
def test_impossible_plans_say_what_to_do(launcher, nproc, environ, message):
    with pytest.raises(LaunchError, match=re.escape(message)):
        plan_launch(launcher, nproc, None, environ)


def test_torchrun_command_meets_on_the_loopback_interface():
    command = build_command(LaunchPlan("torchrun", 2), "a.worker", ["x.yaml", "k=1"])
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert command[-4:] == ["-m", "a.worker", "x.yaml", "k=1"]
    options = command[3:-4]
    assert "--standalone" in options
    assert options[options.index("--local-addr") + 1] == "127.0.0.1"
    assert options[options.index("--nproc-per-node") + 1] == "2"


def test_deepspeed_command_keeps_the_visible_devices():
    plan = plan_launch("deepspeed", 2, None, {"CUDA_VISIBLE_DEVICES": "4,6,7"})
    command = build_command(plan, "a.worker", ["k=1"])
    world = next(option for option in command if option.startswith("--world_info=")).partition("=")[2]
    assert json.loads(base64.urlsafe_b64decode(world)) == {"localhost": ["4", "6"]}
    assert "--master_addr=127.0.0.1" in command
    assert command[-2:] == ["a.worker", "k=1"]


def test_in_process_plan_has_no_command():
    with pytest.raises(ValueError, match="call the worker"):
        build_command(LaunchPlan("in_process", 1), "a.worker", [])


# Hostfiles


@pytest.fixture
def pdsh(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/pdsh").touch(mode=0o755)
    return {"PATH": str(tmp_path / "bin")}


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_hostfile_gives_the_number_of_processes(tmp_path, pdsh):
    path = hostfile(tmp_path, "# two machines\nnode-a slots=4\n\nnode-b  slots=2  # smaller\n")
    assert read_hostfile(path) == {"node-a": 4, "node-b": 2}
    plan = plan_launch("auto", None, path, {**pdsh, "MASTER_PORT": "4321"})
    assert (plan.launcher, plan.nproc, plan.hostfile) == ("deepspeed", 6, path)
    command = build_command(plan, "a.worker", ["model.layers=[1,2]"])
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert {f"--hostfile={path}", "--force_multi", "--master_port=4321"} <= set(command)
    assert command[-2:] == ["a.worker", "'model.layers=[1,2]'"]  # a shell on the other side takes the quotes away


@pytest.mark.parametrize("argument", ["a b", "100%", 'say"hi"'])
def test_arguments_that_pdsh_would_change_are_refused(tmp_path, pdsh, argument):
    plan = plan_launch("auto", None, hostfile(tmp_path, "a slots=1\n"), pdsh)
    with pytest.raises(LaunchError, match="cannot be passed to other machines"):
        build_command(plan, "a.worker", [argument])


def test_every_bad_line_of_a_hostfile_is_reported(tmp_path):
    path = hostfile(tmp_path, "good slots=2\nbad\nzero slots=0\ngood slots=1\ntrailing slots=1 max=2\n")
    with pytest.raises(LaunchError) as caught:
        read_hostfile(path)
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == [f"{path}:{n}" for n in (2, 3, 4, 5)]


@pytest.mark.parametrize("text", ["", "# nothing\n\n"])
def test_hostfile_without_hosts(tmp_path, text):
    with pytest.raises(LaunchError, match="no host in it"):
        read_hostfile(hostfile(tmp_path, text))


def test_missing_hostfile_is_named(tmp_path):
    with pytest.raises(LaunchError, match=r"absent: No such file"):
        read_hostfile(tmp_path / "absent")


@pytest.mark.parametrize(
    ("launcher", "nproc", "environ", "message"),
    [
        ("torchrun", None, {}, "--hostfile needs --launcher deepspeed"),
        ("auto", 3, {}, "has 2 slots"),
        ("auto", None, {"PATH": "/nonexistent"}, "pdsh"),
        ("auto", None, {"MASTER_PORT": "http"}, "MASTER_PORT"),
    ],
)
def test_options_that_contradict_a_hostfile(tmp_path, pdsh, launcher, nproc, environ, message):
    with pytest.raises(LaunchError, match=message):
        plan_launch(launcher, nproc, hostfile(tmp_path, "a slots=2\n"), {**pdsh, **environ})


# The environment of a worker


def test_worker_environment_shares_out_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    assert worker_environment(3, {})["OMP_NUM_THREADS"] == "2"
    assert worker_environment(16, {})["OMP_NUM_THREADS"] == "1"


def test_worker_environment_keeps_what_the_user_has_set():
    base = {"OMP_NUM_THREADS": "5", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7", "TOKENIZERS_PARALLELISM": "true", "A": "b"}
    assert worker_environment(2, base) == base


@pytest.mark.parametrize(
    ("environ", "expected"),
    [({}, False), ({"RANK": "0"}, False), ({"WORLD_SIZE": "2"}, False), ({"RANK": "0", "WORLD_SIZE": "2"}, True)],
)
def test_already_launched(environ, expected):
    assert launch.already_launched(environ) is expected


# Whole jobs


def test_success_is_zero_and_old_error_files_go_away(tmp_path):
    launch.write_worker_error(tmp_path / "logs", 7, 2, "from the run before")
    assert Job(tmp_path, "fake", "ok").end() == (0, "")
    assert not list((tmp_path / "logs").glob("*.error.json"))


def test_the_earliest_error_decides(tmp_path):
    code, errors = Job(tmp_path, "fake", "fail").end()  # rank 0 ends later, stopped by the launcher
    assert (code, errors) == (3, "parity is off\n")


def test_a_failure_at_run_time_names_the_rank(capsys):
    errors = [launch._WorkerError(5.0, 1, 1, "NaN"), launch._WorkerError(6.0, 0, 75, "stopped")]
    assert launch._exit_code(1, [], errors) == 1
    assert capsys.readouterr().err == "rank 1 failed: NaN\n"


def test_damaged_error_files_are_passed_over(tmp_path):
    (tmp_path / "rank-0.error.json").write_text('{"rank"')
    (tmp_path / "rank-1.error.json").write_text("[1]")
    launch.write_worker_error(tmp_path, 2, 75, "stopped")
    assert [(error.rank, error.exit_code) for error in launch._worker_errors(tmp_path)] == [(2, 75)]


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


def test_deepspeed_launcher_for_real(tmp_path):
    job = Job(tmp_path, "deepspeed", "killed")
    code, errors = job.end()
    assert code == 137
    assert errors.splitlines()[-1].startswith("error: a worker was killed by SIGKILL (lack of memory?); ")
