"""Examines the machine and the environment: what is there, what is wrong, what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

Status = Literal["ok", "warn", "fail"]

PACKAGE = "smoe_train"
CHECK_FAILED = 3

NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "fuse.sshfs", "afs"}
)
# On a network file system the builder may run on another machine, out of sight; no build takes this long.
NETWORK_BUILD_SECONDS = 3600.0
BUILD_PROGRAMS = frozenset({"ninja", "c++", "g++", "gcc", "cc", "cc1plus", "clang", "clang++", "as", "ld", "nvcc"})
BUILD_PROGRAMS |= {"cicc", "ptxas", "cudafe++", "hipcc"}

STATUS_STYLES: Mapping[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        section: What it belongs to, e.g. ``versions``.
        name: What was looked at.
        status: ``warn`` limits what can be done, ``fail`` stops training.
        value: What was found.
        advice: What to do; empty if nothing.
    """

    section: str
    name: str
    status: Status
    value: str
    advice: str = ""


@dataclass(frozen=True)
class BuildLock:
    """A lock that torch's extension builder has left or is holding.

    Attributes:
        path: The lock file.
        age_seconds: Time since it was made.
        held_by: Processes of the build; empty if the lock is stale.
    """

    path: Path
    age_seconds: float
    held_by: tuple[str, ...]

    @property
    def stale(self) -> bool:
        """Whether nothing will ever release it."""
        return not self.held_by


@dataclass(frozen=True)
class DoctorReport:
    """All findings, in the order in which they are shown."""

    checks: tuple[Check, ...]

    @property
    def status(self) -> Status:
        """The worst status of any check."""
        found = {check.status for check in self.checks}
        return "fail" if "fail" in found else "warn" if "warn" in found else "ok"


def doctor(fix: bool, json: bool) -> int:
    """Prints the report; returns 0, or 3 if a check failed.

    Args:
        fix: Remove stale build locks.
        json: Print one JSON object instead of a table.
    """
    report = collect(fix=fix)
    if json:
        print(dumps(as_dict(report), indent=2))
    else:
        Console().print(render(report))
    return CHECK_FAILED if report.status == "fail" else 0


def collect(fix: bool = False) -> DoctorReport:
    """Examines everything; with ``fix``, stale build locks are removed (nothing else is ever changed)."""
    checks = [*_versions(), *_accelerator(), *_processor(), *_compilers(), *_build_locks(fix)]
    return DoctorReport(tuple(checks))


def as_dict(report: DoctorReport) -> dict[str, Any]:
    """Returns the report as JSON-able values: ``status`` and a list ``checks``."""
    return {"status": report.status, "checks": [asdict(check) for check in report.checks]}


def render(report: DoctorReport) -> Group:
    """Returns the report as a table for rich, with a closing line."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    for heading in ("", "check", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    section = ""
    for check in report.checks:
        if check.section != section:
            section = check.section
            table.add_row("", f"[bold]{section}[/]", "", "")
        style = STATUS_STYLES[check.status]
        cells = [escape(text) for text in (check.name, check.value, check.advice)]
        table.add_row(f"[{style}]{check.status}[/]", *cells)
    closing = {
        "ok": "[green]Everything is in order.[/]",
        "warn": "[yellow]Training works; the warnings above limit it.[/]",
        "fail": "[bold red]A check failed; see what to do above.[/]",
    }
    return Group(table, "", closing[report.status])


def find_build_locks(environ: Mapping[str, str] | None = None) -> list[BuildLock]:
    """Finds the locks of torch's extension builder, with which DeepSpeed compiles its operators.

    A builder makes the file, keeps it open and removes it. One that was killed leaves it, and everyone who needs
    the same extension then waits for it without a word and without end (``torch.utils.file_baton``).
    """
    folder = extensions_folder(os.environ if environ is None else environ)
    # $TORCH_EXTENSIONS_DIR/<operator>/lock, or <cache>/torch_extensions/<python and accelerator>/<operator>/lock
    paths = sorted({*folder.glob("*/lock"), *folder.glob("*/*/lock")})
    locks = []
    for path in paths:
        with suppress(FileNotFoundError):  # released meanwhile
            age = max(0.0, time.time() - path.stat().st_mtime)
            locks.append(BuildLock(path, age, tuple(_holders(path, age))))
    return locks


def remove_stale(lock: BuildLock) -> bool:
    """Removes a lock if it is stale at this moment; returns whether it did."""
    with suppress(FileNotFoundError):
        age = max(0.0, time.time() - lock.path.stat().st_mtime)
        if next(_holders(lock.path, age), None) is None:
            lock.path.unlink()
            return True
    return False


def extensions_folder(environ: Mapping[str, str]) -> Path:
    """Returns the folder in which torch builds extensions, as torch chooses it."""
    if "TORCH_EXTENSIONS_DIR" in environ:
        return Path(environ["TORCH_EXTENSIONS_DIR"])
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/torch_extensions"
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"


def _holders(path: Path, age_seconds: float) -> Iterator[str]:
    """Yields what may still release a lock: processes that have it open, compilers at work in its folder."""
    lock, folder = path.resolve(), path.resolve().parent
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # ended, or another user's: that one has a cache of its own
            if any(Path(file.path) == lock for file in process.open_files()) or (
                process.name() in BUILD_PROGRAMS
                and (Path(process.cwd()) == folder or any(str(folder) in word for word in process.cmdline()))
            ):
                yield f"{process.name()} (pid {process.pid})"
    kind = _file_system(folder)
    if kind in NETWORK_FILE_SYSTEMS and age_seconds < NETWORK_BUILD_SECONDS:
        yield f"perhaps another machine ({kind})"


def _file_system(folder: Path) -> str:
    mounts = [part for part in psutil.disk_partitions(all=True) if folder.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""


def _build_locks(fix: bool) -> Iterator[Check]:
    section = "extension builds"
    locks = find_build_locks()
    if not locks:
        yield Check(section, "locks", "ok", f"none in {extensions_folder(os.environ)}")
    for lock in locks:
        age = f"{lock.age_seconds / 60:.0f} min old"
        if not lock.stale:
            advice = "wait for it; it is released at the end of the build"
            yield Check(section, str(lock.path), "warn", f"{age}, held by {', '.join(lock.held_by)}", advice)
        elif fix and remove_stale(lock):
            yield Check(section, str(lock.path), "ok", f"stale lock, {age}: removed")
        else:
            advice = "run `smoe-train doctor --fix`; until then every program that needs this extension hangs"
            yield Check(section, str(lock.path), "fail", f"stale lock, {age}: its build was killed", advice)


def _versions() -> Iterator[Check]:
    section = "versions"
    try:
        metadata = importlib.metadata.metadata(PACKAGE)
        requirements = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or []]
    except importlib.metadata.PackageNotFoundError:
        yield Check(section, "python", "ok", platform.python_version())
        yield Check(section, PACKAGE, "warn", "not installed: versions are not checked", "run `pip install -e .`")
        return
    yield _version("python", platform.python_version(), SpecifierSet(metadata["Requires-Python"] or ""))
    yield Check(section, PACKAGE, "ok", metadata["Version"])
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            yield _version(requirement.name, importlib.metadata.version(requirement.name), requirement.specifier)
        except importlib.metadata.PackageNotFoundError:
            yield Check(section, requirement.name, "fail", "not installed", f'pip install "{requirement}"')


def _version(name: str, found: str, allowed: SpecifierSet) -> Check:
    if allowed.contains(found, prereleases=True):
        return Check("versions", name, "ok", found)
    advice = f"use Python {allowed}" if name == "python" else f'pip install "{name}{allowed}"'
    return Check("versions", name, "fail", f"{found}, needed: {allowed}", advice)


def _accelerator() -> Iterator[Check]:
    section = "accelerator"
    try:
        import torch
    except Exception as error:  # a broken installation raises anything: OSError, ImportError, RuntimeError
        first = next(iter(str(error).splitlines()), type(error).__name__)
        yield Check(section, "torch", "fail", f"cannot be imported: {first}", "reinstall torch for this machine")
        return
    build = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU"
    )
    yield Check(section, "torch build", "ok", build)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            value = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
            has_bf16 = device.major >= 8 or torch.version.hip is not None
            advice = "" if has_bf16 else "bf16 is slow before compute capability 8.0; use parallel.precision=fp32"
            yield Check(section, f"device {index}", "ok" if has_bf16 else "warn", value, advice)
    elif Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi"):
        advice = "install the CUDA build of torch, and check that `nvidia-smi` lists the GPU"
        yield Check(section, "device", "warn", "an NVIDIA driver is there, but torch sees no GPU", advice)
    else:
        yield Check(section, "device", "ok", "none; training runs on the CPU (gloo)")
    forced = os.environ.get("DS_ACCELERATOR")
    if forced is not None:
        yield Check(section, "DS_ACCELERATOR", "ok", f"{forced} (DeepSpeed looks for no other)")
    if not hasattr(torch.nn.functional, "grouped_mm"):
        advice = "upgrade torch; experts run one by one until then"
        yield Check(section, "grouped_mm", "warn", "not in this torch", advice)


def _processor() -> Iterator[Check]:
    section = "processor"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Check(section, "cores", "ok", f"{usable} usable of {os.cpu_count()}")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) > usable:
        advice = "unset it: each worker then gets its share of the cores"
        yield Check(section, "OMP_NUM_THREADS", "warn", f"{threads}, more than the cores", advice)
    else:
        yield Check(section, "OMP_NUM_THREADS", "ok", threads or "not set; workers share the cores out")
    yield Check(section, "memory", "ok", f"{psutil.virtual_memory().total / 2**30:.1f} GiB")
    flags = _processor_flags()
    if flags:
        fast = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags]
        bf16 = "bf16 is fast" if {"amx_bf16", "avx512_bf16"} & flags else "bf16 is emulated, fp32 is faster"
        yield Check(section, "instructions", "ok", f"{' '.join(fast) or 'no AVX2'}; {bf16}")


def _processor_flags() -> frozenset[str]:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def _compilers() -> Iterator[Check]:
    for name in ("g++", "ninja", "nvcc"):
        yield Check("compilers (none is needed)", name, "ok", _tool_version(name))


def _tool_version(name: str) -> str:
    program = shutil.which(name)
    if program is None:
        return "not found"
    with suppress(OSError, subprocess.SubprocessError):
        output = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
        lines = [line for line in output.splitlines() if line.strip()]
        release = [line for line in lines if "release" in line]  # nvcc: the version stands below its name
        return (release or lines or [program])[0].strip()
    return f"{program} (does not run)"
