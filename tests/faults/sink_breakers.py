"""The ways to break what a run reports to; each acts in the run's own process, on real files, sockets and modules."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from smoe_train.cli.last_words import LOGS
from smoe_train.reporting import METRICS, ROUTING
from smoe_train.reporting.sinks import jsonl

STEPS = 24
BREAK, MEND, LAST = 6, 14, -1
RECORDS = (METRICS, ROUTING)

# What to do just before the record of a step is written; at LAST, before the run closes its sinks.
Events = Mapping[int, Callable[[], None]]


@dataclass(frozen=True)
class Fault:
    """One way to break one thing.

    Attributes:
        name: How it is broken.
        prepare: Does so in the run's process before the run begins, or returns what to do later.
        sections: Of the recipe.
        injections: System calls on the record that fail, as strace writes it.
        keeps_record: Whether every record must be in the files at the end.
        warnings: How often it may be said, at most.
        draws_report: Whether the report is drawn at the end.
        short: Whether it is tried at every scale.
        impossible: Why it cannot be tried here.
    """

    name: str
    prepare: Callable[[Path], Events | None]
    sections: Mapping[str, Any] = field(default_factory=dict)
    injections: tuple[str, ...] = ()
    keeps_record: bool = True
    warnings: int = 1
    draws_report: bool = False
    short: bool = False
    impossible: str = ""


def all_faults(no_trace: str) -> dict[str, list[Fault]]:
    """Returns the faults by the line of the table that they make.

    Args:
        no_trace: Why system calls cannot be made to fail here, if so.
    """
    return {
        "metrics.jsonl, routing.jsonl: disk full, read-only, failing, vanished while the run goes on": _records(
            no_trace
        ),
        "W&B unreachable, silent, refusing, slow, raising, exiting, killed": _wandb(),
        "TensorBoard not importable, without its folder, without room": _tensorboard(),
        "console closed, full, paused; log file or report not writable": _console() + _logs(),
    }


def _nothing(run_folder: Path) -> None:
    pass


# The record


def _records(no_trace: str) -> list[Fault]:
    traced: Any = {"prepare": _nothing, "impossible": no_trace}
    return [
        # Both files fail, and each of them is said.
        Fault("no room for a while", _no_room, warnings=2, short=True),
        Fault("no room, and little memory", _little_memory, keeps_record=False, warnings=4),
        Fault("removed", _removed, keeps_record=False, warnings=2),
        Fault("a folder in its place for a while", _folder_in_place, warnings=2),
        Fault("a folder in its place to the end", _folder_to_the_end, keeps_record=False, warnings=4),
        Fault("the run folder is gone for a while", _away, warnings=3),
        Fault("EIO at writes", **traced, injections=("write:error=EIO:when=3..9",)),
        Fault("EROFS at writes", **traced, injections=("write:error=EROFS:when=3..9",)),
        Fault("EDQUOT at writes", **traced, injections=("write:error=EDQUOT:when=3..9",)),
        Fault("EIO at flushes", **traced, injections=("fsync:error=EIO:when=3..9",)),
    ]


def _no_room(run_folder: Path) -> Events:
    """Files may not grow by more than a part of a record, so that one is torn."""
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit() -> None:
        size = min((run_folder / name).stat().st_size for name in RECORDS)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 60, whole[1]))

    def lift() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, whole)
        time.sleep(0.1)  # a disk that failed is not asked again at once

    return {BREAK: limit, MEND: lift}


def _little_memory(run_folder: Path) -> Events:
    jsonl.JsonLines.__init__.__defaults__ = (3000,)  # type: ignore[misc]
    return _no_room(run_folder)


def _removed(run_folder: Path) -> Events:
    return {BREAK: lambda: [(run_folder / name).unlink() for name in RECORDS]}


def _folder_in_place(run_folder: Path) -> Events:
    def replace() -> None:
        for name in RECORDS:
            (run_folder / name).rename(run_folder / f"{name}.away")
            (run_folder / name).mkdir()

    def put_back() -> None:
        for name in RECORDS:
            (run_folder / name).rmdir()
            (run_folder / f"{name}.away").rename(run_folder / name)
        time.sleep(0.1)

    return {BREAK: replace, MEND: put_back}


def _folder_to_the_end(run_folder: Path) -> Events:
    return {BREAK: _folder_in_place(run_folder)[BREAK]}


def _away(run_folder: Path) -> Events:
    away = run_folder.with_name("away")

    def put_back() -> None:
        away.rename(run_folder)
        time.sleep(0.1)

    return {BREAK: lambda: run_folder.rename(away), MEND: put_back}


# Trackers


def _wandb() -> list[Fault]:
    def fault(name: str, prepare: Callable[[Path], Events | None], mode: str = "online", **options: Any) -> Fault:
        return Fault(name, prepare, {"reporting": {"wandb": {"mode": mode}}}, **options)

    missing = "" if importlib.util.find_spec("wandb") else "wandb is not installed"
    return [
        fault("nothing listens", _server(lambda: 9), impossible=missing),
        fault("accepts and never answers", _server(_silent_server), impossible=missing),
        fault("refuses the key", _server(lambda: _http_server(401)), impossible=missing),
        fault("answers every call with 500", _server(lambda: _http_server(500)), impossible=missing),
        fault("no key", _no_key, impossible=missing),
        fault("its folder is a file", _wandb_folder_is_a_file, mode="offline", warnings=0, impossible=missing),
        fault("its process is killed", _wandb_core_killed, mode="offline", impossible=missing),
        fault("cannot be imported", lambda run_folder: sys.modules.update(wandb=None)),  # type: ignore[arg-type]
        fault("its start sleeps", _stub(init=lambda: time.sleep(60)), mode="offline"),
        fault("its start exits", _stub(init=lambda: sys.exit("no tty")), mode="offline"),
        fault("its log raises", _stub(log=_raise_quota), mode="offline", short=True),
        fault("its log sleeps", _stub(log=lambda: time.sleep(60)), mode="offline"),
        fault("its end sleeps", _stub(finish=lambda: time.sleep(60)), mode="offline"),
    ]


def _server(start: Callable[[], int]) -> Callable[[Path], None]:
    def prepare(run_folder: Path) -> None:
        _wandb_environment(run_folder)
        os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{start()}"
        os.environ["WANDB_API_KEY"] = "0" * 40

    return prepare


def _wandb_environment(run_folder: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        del os.environ[name]
    os.environ["NETRC"] = str(run_folder / "no-netrc")


def _silent_server() -> int:
    listening = socket.create_server(("127.0.0.1", 0))
    listening.set_inheritable(True)
    _kept.append(listening)
    return int(listening.getsockname()[1])


_kept: list[Any] = []


def _http_server(status: int) -> int:
    """A server in a process of its own, which ends with this one."""
    script = (
        "import ctypes, http.server, sys\n"
        "ctypes.CDLL(None).prctl(1, 9)\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    def answer(self):\n"
        "        self.send_response(int(sys.argv[1])); self.send_header('Content-Length', '0'); self.end_headers()\n"
        "    do_GET = do_POST = do_PUT = answer\n"
        "    def log_message(self, *words): pass\n"
        "server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)\n"
        "print(server.server_address[1], flush=True)\n"
        "server.serve_forever()\n"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", script, str(status)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert server.stdout is not None
    _kept.append(server)
    return int(server.stdout.readline())


def _no_key(run_folder: Path) -> None:
    _wandb_environment(run_folder)
    os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:9"


def _wandb_folder_is_a_file(run_folder: Path) -> None:
    _wandb_environment(run_folder)
    (run_folder / "file").write_text("in the way")
    os.environ["WANDB_DIR"] = str(run_folder / "file")


def _wandb_core_killed(run_folder: Path) -> Events:
    _wandb_environment(run_folder)

    def kill() -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            cores = [one for one in psutil.Process().children(True) if one.name().startswith("wandb-core")]
            for core in cores:
                core.kill()
            if cores:
                return
            time.sleep(0.05)

    return {BREAK: kill}


def _stub(**behaviour: Callable[[], None]) -> Callable[[Path], None]:
    """A module in the place of W&B whose calls do something else first."""

    def prepare(run_folder: Path) -> None:
        def call(name: str) -> Callable[..., Any]:
            def called(*arguments: Any, **options: Any) -> Any:
                behaviour.get(name, lambda: None)()
                return run

            return called

        run = types.SimpleNamespace(dir=str(run_folder / "wandb"), url="stub", define_metric=lambda *_, **__: None)
        run.log, run.finish = call("log"), call("finish")
        stub: Any = types.ModuleType("wandb")
        stub.Settings = lambda **options: types.SimpleNamespace(**options)
        settings = types.SimpleNamespace(base_url="http://127.0.0.1:9", api_key="0" * 40, identity_token_file=None)
        stub.setup = lambda settings_given: types.SimpleNamespace(settings=settings)
        stub.init, stub.teardown = call("init"), call("teardown")
        sys.modules["wandb"] = stub
        os.environ["WANDB_MODE"] = "offline"

    return prepare


def _raise_quota() -> None:
    raise OSError(122, "Disk quota exceeded")


def _tensorboard() -> list[Fault]:
    missing = "" if importlib.util.find_spec("tensorboard") else "TensorBoard is not installed"
    no_mount = "" if os.geteuid() == 0 else "only root may mount a file system"
    sections = {"reporting": {"tensorboard": True}}
    module = "torch.utils.tensorboard"
    return [
        Fault("a file in the place of its folder", _file_at("tensorboard"), sections, impossible=missing),
        Fault("cannot be imported", lambda _: sys.modules.update({module: None}), sections, impossible=missing),  # type: ignore[dict-item]
        Fault("its folder is removed", _tensorboard_removed, sections, impossible=missing),
        Fault("no room for its files", _tensorboard_without_room, sections, impossible=missing or no_mount),
    ]


def _file_at(name: str) -> Callable[[Path], None]:
    def prepare(run_folder: Path) -> None:
        (run_folder / name).write_text("in the way")

    return prepare


def _wait_for(folder: Path) -> None:
    deadline = time.monotonic() + 60  # the first import may be slow
    while not any(folder.glob("events*")) and time.monotonic() < deadline:
        time.sleep(0.02)


def _tensorboard_removed(run_folder: Path) -> Events:
    def remove() -> None:
        _wait_for(run_folder / "tensorboard")
        shutil.rmtree(run_folder / "tensorboard")

    return {BREAK: remove}


def _tensorboard_without_room(run_folder: Path) -> Events:
    folder = run_folder / "tensorboard"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)], check=True)

    def unmount() -> None:
        time.sleep(0.3)  # for the thread to have tried
        subprocess.run(["umount", "--lazy", str(folder)], check=True)

    return {LAST: unmount}


# People


def _console() -> list[Fault]:
    return [
        Fault("its reader is gone", _reader_gone, warnings=0, short=True),
        Fault("a device without room", _console_to("/dev/full"), warnings=0),
        Fault("closed by whoever started the run", _console_closed, warnings=0),
        Fault("paused while the run goes on", _console_paused),
    ]


def _reader_gone(run_folder: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    _put_in_place(writing)


def _console_to(path: str) -> Callable[[Path], None]:
    return lambda run_folder: _put_in_place(os.open(path, os.O_WRONLY))


def _put_in_place(descriptor: int) -> None:
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _console_closed(run_folder: Path) -> None:
    sys.stdout = sys.stderr = None  # type: ignore[assignment]
    os.close(1)
    os.close(2)


def _console_paused(run_folder: Path) -> Events:
    reading, writing = os.pipe()
    _kept.append(reading)  # nobody reads

    def pause() -> None:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, b"\n" * 4096)
        os.set_blocking(writing, True)

    return {BREAK: pause}


def _logs() -> list[Fault]:
    return [
        Fault("the folder of logs is removed", _logs_removed, warnings=0),
        Fault("the folder of the report is a file", _file_at("report"), draws_report=True),
    ]


def _logs_removed(run_folder: Path) -> Events:
    return {BREAK: lambda: shutil.rmtree(run_folder / LOGS)}
