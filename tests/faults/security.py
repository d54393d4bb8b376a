"""Hostile files against every command that reads them: nothing is executed, sent, or written where it should not be."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import stat
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from faults.hostile_artefacts import CANARY, RUN, Artefact, Command, payloads
from faults.hostile_inputs import hostile_inputs
from faults.hostile_runs import hostile_runs
from faults.judged_command import Ended, smoe_train
from faults.scenario import Outcome, Scale
from support.tiny import tiny_recipe, write_text

# What commands import when they run is imported once, before processes are forked; matplotlib then writes a cache.
IMPORTED = ("matplotlib.font_manager", *(f"smoe_train.cli.{name}" for name in ("evaluate_tasks", "export", "worker")))

SHORT_EVERY = 12  # at the short scale, each so many artefacts
# The commands that each artefact meets; where it has more, the next artefact meets others.
COMMANDS: Mapping[Scale, int] = {"short": 2, "commit": 3, "nightly": 100}
SECONDS = 20.0
CHILD_SECONDS = 240.0
MORE_MEMORY_BYTES = 768 << 20
SECRET = "secret-4f2a9c"
SECRETS = ("SECRET_TOKEN", "WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")

# What no command does with files, whoever wrote them; `open` and what changes files is judged by path.
FORBIDDEN = frozenset({
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen", "pty.spawn",
    "pickle.find_class", "socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo",
    "socket.gethostbyname", "urllib.Request", "ftplib.connect", "smtplib.connect", "webbrowser.open", "code.__new__",
})  # fmt: skip
CHANGES_FIRST = frozenset({
    "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.setxattr", "os.mkfifo",
    "shutil.rmtree",
})  # fmt: skip
CHANGES_BOTH = frozenset({"os.rename", "os.link", "os.symlink", "shutil.move", "shutil.copyfile", "shutil.copytree"})
# Of what is renamed or removed the name counts, of these what a link leads to.
FOLLOWS_LINKS = frozenset({"open", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.setxattr", "shutil.copyfile"})
# The programs that a run's record of its surroundings asks, by their own paths.
HARMLESS_PROGRAMS = frozenset({"git", "uname"})


def run(scale: Scale, folder: Path) -> list[Outcome]:
    """Plants each artefact into a copy of a sound run, and gives that to commands that read it, in a forked process."""
    place, base = folder / "place", folder / "base"
    before = os.getcwd()
    for module in IMPORTED:
        importlib.import_module(module)
    with _environment(place):
        try:
            _make_base(place, base)
            os.chdir(place / "work")
            _require_sharp_eyes(place)
            artefacts = [
                _with_some(one, number, COMMANDS[scale])
                for number, one in enumerate([*hostile_runs(), *hostile_inputs()])
            ]
            if scale == "short":
                artefacts = artefacts[::SHORT_EVERY]
            failures: dict[str, str] = {}
            tried: dict[str, list[Artefact]] = {}
            for artefact in artefacts:
                tried.setdefault(artefact.catalogue, []).append(artefact)
                if complaint := _complaint(artefact, place, base):
                    failures[artefact.name] = complaint
        finally:
            os.chdir(before)
            shutil.rmtree(place, ignore_errors=True)
    return [
        Outcome(
            FAULTS[catalogue],
            catalogue,
            len(some),
            sum(one.name not in failures for one in some),
            plain_deepspeed=PLAIN.get(catalogue, ""),
            failures=tuple(f"{one.name}: {failures[one.name]}" for one in some if one.name in failures),
            measured={"commands": sum(len(one.commands) for one in some)},
        )
        for catalogue, some in sorted(tried.items())
    ]


FAULTS = {
    "E1": "pickle in a file of a run, checkpoint or export",
    "E2": "pickle or code in data, cache or tokenizer",
    "E3": "safetensors header that lies about its size",
    "E4": "manifest, pointer or link that leads out",
    "E5": "name of a run or task that leads out",
    "E6": "archive whose members lead out, are links or lie",
    "E7": "bomb: archive, row, footer or size beyond all measure",
    "E8": "YAML that asks for code, secrets or memory",
    "E9": "escape sequences and scripts in names, labels and records",
    "E10": "code beside an export",
}
PLAIN = {"E1": "runs it: `engine.load_checkpoint` unpickles (43 calls with weights_only=False in 0.19)"}


def _with_some(artefact: Artefact, number: int, count: int) -> Artefact:
    """Returns the artefact with some of its commands, in their order."""
    total = len(artefact.commands)
    chosen = {(number * count + i) % total for i in range(min(count, total))}
    return replace(artefact, commands=[artefact.commands[i] for i in sorted(chosen)])


def _make_base(place: Path, base: Path) -> None:
    """Trains a tiny run and exports it, and keeps both with all else that artefacts are planted into."""
    for path in (place, base):
        shutil.rmtree(path, ignore_errors=True)
    (place / "work" / "tmp").mkdir(parents=True)
    code = _forked(lambda: _train_and_export(place / "work"), CHILD_SECONDS)
    assert code == 0, f"the sound run ended with {code}"
    (place / "outside" / "folder").mkdir(parents=True)
    (place / "outside" / "keep.txt").write_text("keep")
    shutil.copyfile(place / "work" / RUN / "checkpoints/step-00000002/shared.safetensors",
                    place / "outside" / "secret.safetensors")  # fmt: skip
    shutil.copytree(place, base, symlinks=True)


def _train_and_export(work: Path) -> None:
    os.chdir(work)
    recipe = tiny_recipe(
        write_text(work / "corpus.txt", 900),
        1,
        parallel={"engine": "local"},
        tokenizer={"type": "word"},
        training={"max_steps": 2, "self_test": False},
        evaluation={"every_steps": 2, "max_tokens": 50},
    )
    Path("recipe.yaml").write_text(recipe.to_yaml().replace(f"{work}/", ""), encoding="utf-8")
    with _no_report_after_training():
        for arguments in (("train", "recipe.yaml"), ("checkpoint", "export", str(RUN), "export")):
            end = smoe_train(*arguments)
            assert end.code == 0, end.err


def _no_report_after_training() -> Any:
    """Drawing is most of a tiny run's time; the command ``report`` draws all the same."""
    return mock.patch("smoe_train.cli.worker.write_report")


def _complaint(artefact: Artefact, place: Path, base: Path) -> str | None:
    """Returns what went wrong with an artefact, or None."""
    for path in place.iterdir():
        if path.name != "work":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (place / "work").iterdir():  # the folder itself is the one that this process is in
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.copytree(base, place, symlinks=True, dirs_exist_ok=True)
    outside = _contents(place / "outside")
    answer = place.parent / "answer.json"
    answer.unlink(missing_ok=True)
    code = _forked(lambda: _try(artefact, place, answer), CHILD_SECONDS)
    complaints: list[str] = []
    if not answer.is_file():
        complaints.append(f"the process ended with {code} and no answer")
    else:
        complaints += json.loads(answer.read_text())
    if (place / CANARY).exists():
        complaints.append("the payload was executed")
    if _contents(place / "outside") != outside:
        complaints.append("what lies outside was changed")
    complaints += [f"{path} holds a secret" for path in _with_secrets(place / "work")]
    return "; ".join(complaints)[:1500] or None


def _try(artefact: Artefact, place: Path, answer: Path) -> None:
    """Plants the artefact, then runs its commands under an audit hook and with limited memory."""
    os.chdir(place / "work")
    artefact.plant()
    _limit_memory()
    events: list[str] = []
    allowed = [place / "work" / name for name in ("runs", "cache", "out", "tmp", "copy.yaml")]
    sys.addaudithook(_Audit([str(path.resolve()) for path in allowed], str(place / "work"), events))
    complaints = []
    for command in artefact.commands:
        with _no_report_after_training():
            found = _judged(command, artefact, smoe_train(*command))
        complaints += [f"{' '.join(command)[:80]!r}: {complaint}" for complaint in [*found, *events]]
        events.clear()
    answer.write_text(json.dumps(complaints))


def _judged(command: Command, artefact: Artefact, end: Ended) -> list[str]:
    complaint = end.complaint(allowed=(1, 2) if artefact.refused else (0, 1, 2), seconds=SECONDS)
    if complaint is None and SECRET in end.out + end.err:
        complaint = "a secret was printed"
    return [] if complaint is None else [complaint]


class _Audit:
    """Notes what must not happen.

    Args:
        allowed: Where files may be written, resolved.
        work: The folder of hostile files.
        events: Receives what was seen.
    """

    def __init__(self, allowed: list[str], work: str, events: list[str]) -> None:
        self._allowed = allowed
        self._work = work
        self._events = events
        self._inside = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._inside:
            return
        self._inside = True
        try:
            problem = self._problem(event, arguments)
            if problem is not None and len(self._events) < 5:
                self._events.append(f"{problem} at {_where()}")
        finally:
            self._inside = False

    def _problem(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        if event in FORBIDDEN:
            if event == "subprocess.Popen" and os.path.basename(str(arguments[0])) in HARMLESS_PROGRAMS:
                return None
            return f"{event}{arguments!r}"[:200]
        if event == "exec" and str(getattr(arguments[0], "co_filename", "")).startswith(self._work):
            return f"exec of {arguments[0].co_filename}"
        paths: list[Any] = []
        if event == "open" and _writes(*arguments[1:3]):
            paths = [arguments[0]]
        elif event in CHANGES_FIRST:
            paths = [_at(arguments[0], arguments[-1] if event != "shutil.rmtree" else None)]
        elif event in CHANGES_BOTH:
            paths = list(arguments[:2]) if event != "os.symlink" else [arguments[1]]
            if event in ("shutil.copyfile", "shutil.copytree"):
                paths = paths[1:]
        outside = [path for path in paths if not self._may_write(path, of_link=event not in FOLLOWS_LINKS)]
        return f"{event} of {outside[0]!r}" if outside else None

    def _may_write(self, path: Any, of_link: bool) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):  # a descriptor that was opened, and judged, before
            return True
        name = os.fsdecode(path)
        target = os.path.realpath(name)
        if of_link:
            target = os.path.join(os.path.realpath(os.path.dirname(name) or "."), os.path.basename(name))
        if target.startswith(("/dev/", "/proc/self/")):
            return not target.startswith("/dev/shm/")
        return any(target == one or target.startswith(f"{one}/") for one in self._allowed)


def _writes(mode: Any, flags: Any) -> bool:
    if isinstance(mode, str):
        return any(one in mode for one in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


def _at(path: Any, folder: Any) -> Any:
    """Returns the whole path of one that is relative to an open folder, as `shutil.rmtree` names them."""
    if (
        isinstance(path, str | bytes)
        and isinstance(folder, int)
        and folder > 2
        and not os.path.isabs(os.fsdecode(path))
    ):
        with contextlib.suppress(OSError):
            return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
    return path


def _where() -> str:
    frames = [frame for frame in traceback.extract_stack() if "/smoe_train/" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


def _require_sharp_eyes(place: Path) -> None:
    """Makes sure that each payload would work, and that the hook sees it: else all that follows proves nothing."""

    def execute() -> None:
        events: list[str] = []
        sys.addaudithook(_Audit([], str(place / "work"), events))
        for kind, data in payloads().items():
            events.clear()
            with contextlib.suppress(Exception):
                if "numpy" in kind:
                    np.load(io.BytesIO(data), allow_pickle=True)
                elif "torch.save" in kind:
                    torch.load(io.BytesIO(data), weights_only=False)
                else:
                    pickle.loads(data)
            assert events, f"{kind} went unseen"
        events.clear()
        (place / "outside" / "by-a-test").write_text("x")
        assert events, "a file outside went unseen"

    code = _forked(execute, CHILD_SECONDS)
    assert code == 0, f"the audit hook is blind: {code}"
    for path in (place / CANARY, place / "outside" / "by-a-test"):
        assert path.exists(), f"{path.name}: no payload has worked"
        path.unlink()


def _limit_memory() -> None:
    import psutil

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now: int = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + MORE_MEMORY_BYTES, hard))
    del soft


def _forked(work: Any, seconds: float) -> int | None:
    """Runs some work in a forked process and returns its exit code."""

    def child() -> None:
        faulthandler.enable()
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(70)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def _contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (
            stat.S_IMODE(path.lstat().st_mode),
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted(folder.rglob("*"))
    }


def _with_secrets(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and stat.S_ISREG(path.stat().st_mode):
            with path.open("rb") as file:
                if SECRET.encode() in file.read(1 << 20):
                    yield path


@contextlib.contextmanager
def _environment(place: Path) -> Iterator[None]:
    """Points caches and temporary files into the work folder, switches networks off, and sets secrets."""
    work = place / "work"
    changes: Mapping[str, str] = {
        "SMOE_TRAIN_CACHE": str(work / "cache"),
        "HF_HOME": str(work / "cache" / "hf"),
        "TMPDIR": str(work / "tmp"),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        **dict.fromkeys(SECRETS, SECRET),
    }
    before = {name: os.environ.get(name) for name in changes}
    wrote = sys.dont_write_bytecode
    os.environ.update(changes)
    tempfile.tempdir = None
    sys.dont_write_bytecode = True
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        sys.dont_write_bytecode = wrote
        tempfile.tempdir = None
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
