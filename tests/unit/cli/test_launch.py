import base64
import json
import os
import re
import sys
from pathlib import Path

import pytest

from smoe_train.cli import launch
from smoe_train.cli.launch import LaunchPlan, build_command, plan_launch, read_hostfile, worker_environment
from smoe_train.errors import LaunchError

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


def test_what_onednn_keeps_is_bounded():
    """A product in bf16 takes 0.4 to 0.7 MB: the 20,000 of other advice are 13 GB."""
    assert 1024 < int(worker_environment(1, {})["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) * 0.7 < 2000


def test_worker_environment_keeps_what_the_user_has_set():
    base = {
        "OMP_NUM_THREADS": "5",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7",
        "TOKENIZERS_PARALLELISM": "true",
        "GLOO_SOCKET_IFNAME": "eth7",
        "A": "b",
    }
    assert worker_environment(2, base) == base


@pytest.mark.parametrize(
    ("environ", "expected"),
    [({}, False), ({"RANK": "0"}, False), ({"WORLD_SIZE": "2"}, False), ({"RANK": "0", "WORLD_SIZE": "2"}, True)],
)
def test_already_launched(environ, expected):
    assert launch.already_launched(environ) is expected
