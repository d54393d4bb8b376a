import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple

import pytest
from packaging.specifiers import SpecifierSet
from rich.console import Console

from smoe_train.cli import doctor
from smoe_train.cli.doctor import Check, DoctorReport


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


def make_lock(folder, operator="deepspeed_shm_comm", age_seconds=0.0):
    path = folder / operator / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    made = time.time() - age_seconds
    os.utime(path, (made, made))
    return path


def locks_section():
    return list(doctor._build_locks(fix=False))


def test_no_lock_is_in_order(folder):
    assert [check.status for check in locks_section()] == ["ok"]


def test_a_lock_without_a_build_is_stale(folder):
    path = make_lock(folder / "py311_cpu", age_seconds=600)
    (lock,) = doctor.find_build_locks()
    assert lock.path == path
    assert lock.stale
    assert lock.age_seconds == pytest.approx(600, abs=60)
    (check,) = locks_section()
    assert (check.status, check.name) == ("fail", str(path))
    assert "10 min" in check.value
    assert "--fix" in check.advice
    assert path.exists()


def test_a_lock_that_torch_itself_holds_is_left_alone(folder):
    path = folder / "some_operator" / "lock"
    path.parent.mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, sys; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print(flush=True); sys.stdin.read()",
            str(path),
        ],  # the system call of torch.utils.file_baton, whose import would take two seconds
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    (lock,) = doctor.find_build_locks()
    assert not lock.stale
    assert f"pid {holder.pid}" in lock.held_by[0]
    (check,) = doctor._build_locks(fix=True)
    assert check.status == "warn"
    assert path.exists()
    holder.kill()
    holder.wait()
    assert doctor.remove_stale(lock)
    assert not path.exists()


def test_a_compiler_that_outlived_its_python_still_holds(folder):
    path = make_lock(folder)
    ninja = path.parent / "ninja"
    shutil.copy(shutil.which("sleep"), ninja)
    process = subprocess.Popen([str(ninja), "60"], cwd=path.parent)
    try:
        (lock,) = doctor.find_build_locks()
        assert lock.held_by == (f"ninja (pid {process.pid})",)
    finally:
        process.kill()
        process.wait()
    assert doctor.find_build_locks()[0].stale


def test_waiting_processes_and_shells_in_the_folder_do_not_hold(folder):
    path = make_lock(folder)
    process = subprocess.Popen(["sleep", "60"], cwd=path.parent)
    try:
        assert doctor.find_build_locks()[0].stale
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("age_seconds", "stale"), [(60, False), (7200, True)])
def test_on_a_network_file_system_age_decides(folder, monkeypatch, age_seconds, stale):
    partition = namedtuple("partition", "mountpoint fstype")
    parts = [partition("/", "ext4"), partition(str(folder), "nfs4")]
    monkeypatch.setattr(doctor.psutil, "disk_partitions", lambda all: parts)
    make_lock(folder, age_seconds=age_seconds)
    assert doctor.find_build_locks()[0].stale is stale


def test_fix_removes_stale_locks_only(folder, monkeypatch):
    paths = [make_lock(folder, name) for name in ("one", "two")]
    with paths[1].open():
        checks = list(doctor._build_locks(fix=True))
        assert [check.status for check in checks] == ["ok", "warn"]
        assert [path.exists() for path in paths] == [False, True]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [({"TORCH_EXTENSIONS_DIR": "/x"}, "/x"), ({"XDG_CACHE_HOME": "/cache"}, "/cache/torch_extensions")],
)
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has another cache folder")
def test_extensions_folder(environ, expected):
    assert str(doctor.extensions_folder(environ)) == expected


@pytest.mark.parametrize(
    ("found", "status"), [("0.19.7", "fail"), ("0.19.8", "ok"), ("0.19.9+cu130", "ok"), ("0.20.0", "fail")]
)
def test_versions_are_held_against_the_range(found, status):
    check = doctor._version("deepspeed", found, SpecifierSet(">=0.19.8,<0.20"))
    assert check.status == status
    assert ("pip install" in check.advice) is (status == "fail")


def test_a_missing_dependency_fails(monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "metadata", lambda _: {"Requires-Python": ">=3.10", "Version": "1"})
    monkeypatch.setattr(
        doctor.importlib.metadata, "requires", lambda _: ["no-such-package>=2", 'other; extra == "docs"', "pytest>=1"]
    )
    checks = {check.name: check for check in doctor._versions()}
    assert checks["no-such-package"].status == "fail"
    assert checks["no-such-package"].advice == 'pip install "no-such-package>=2"'
    assert "other" not in checks
    assert checks["pytest"].status == checks["python"].status == "ok"


def test_too_many_threads_are_a_warning(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    checks = {check.name: check for check in doctor._processor()}
    assert checks["OMP_NUM_THREADS"].status == "warn"


@pytest.mark.parametrize(
    ("statuses", "expected", "code"), [("ok ok", "ok", 0), ("ok warn", "warn", 0), ("warn fail", "fail", 3)]
)
def test_the_worst_check_decides(monkeypatch, capsys, statuses, expected, code):
    report = DoctorReport(tuple(Check("s", "n", status, "v") for status in statuses.split()))
    monkeypatch.setattr(doctor, "collect", lambda fix: report)
    assert doctor.doctor(fix=False, json=True) == code
    assert json.loads(capsys.readouterr().out)["status"] == expected


def test_the_table_shows_values_with_brackets_as_they_are():
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(doctor.render(DoctorReport((Check("s", "lm-eval[hf]", "warn", "[red]", "see [1]"),))))
    text = console.export_text()
    assert all(part in text for part in ("lm-eval[hf]", "[red]", "see [1]", "warn"))


def test_this_machine(folder):
    make_lock(folder)
    report = doctor.collect(fix=True)
    names = {check.name for check in report.checks}
    assert {"python", "torch build", "cores", "g++", "memory"} <= names
    assert json.loads(json.dumps(doctor.as_dict(report))) == doctor.as_dict(report)
    assert not doctor.find_build_locks()
