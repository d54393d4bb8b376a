"""Output folders that no run can write to, and odd ones that it can."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from faults.lives import Life
from faults.runs import LIFE_SECONDS
from faults.scenario import Outcome
from support.tiny import tiny_recipe, write_text

from smoe_train.cli import app, worker
from smoe_train.parallel.process import LAUNCH_VARIABLES


def unusable_places(folder: Path, few: bool) -> Outcome:
    """Where no run can write, the command ends before anything is trained; where one can, however odd, it trains."""
    write_text(folder / "corpus.txt")
    failures: list[str] = []
    (folder / "file").write_text("in the way")
    (folder / "dangling").symlink_to(folder / "nowhere" / "at all")
    unusable = {
        "below a file": folder / "file" / "runs",
        "a dangling link": folder / "dangling",
        "a name of 300 bytes": folder / ("n" * 300),
    }
    usable = {
        "a name of 255 bytes": folder / ("n" * 255),
        "a name that is not UTF-8": folder / os.fsdecode(b"runs-\xff\xfe"),
    }
    if few:
        unusable, usable = {name: unusable[name] for name in ("a name of 300 bytes",)}, {}
    for code, places in ((2, unusable), (0, usable)):
        for name, place in places.items():
            failures += [f"{name}: {problem}" for problem in _command(folder, place, code)]
    tried = len(unusable) + len(usable)
    if may_mount() and not few:
        place = folder / "read-only"
        place.mkdir()
        with mounted(place, "ro"):
            failures += [f"a read-only file system: {problem}" for problem in _command(folder, place / "runs", 2)]
        tried += 1
    line = "an output folder that cannot be written: an error before training; odd names work"
    return Outcome(line, "C12", tried, tried - len(failures), failures=tuple(failures))


def _command(folder: Path, output: Path, code: int) -> list[str]:
    """Runs ``smoe-train train`` into an output folder; returns what is wrong with how it ended."""
    recipe, said = folder / "local.yaml", folder / "said.txt"
    text = folder / "corpus.txt"
    training = {"max_steps": 1, "micro_batch_size": 8}
    recipe.write_text(tiny_recipe(text, 1, parallel={"engine": "local"}, training=training).to_yaml())
    said.unlink(missing_ok=True)

    def work() -> int:
        for name in LAUNCH_VARIABLES:
            os.environ.pop(name, None)
        worker.write_report = lambda run_folder: run_folder
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc]
        sys.argv = ["smoe-train", "train", str(recipe), "--output-dir", str(output)]
        try:
            app.main()
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 1
        return 0

    life = Life(1, work, said)
    if not life.wait(LIFE_SECONDS):
        life.kill()
        return ["hangs"]
    printed = said.read_text(errors="replace")
    wrong = life.codes != [code] or "Traceback" in printed or (code and "cannot be" not in printed)
    return [f"exit code {life.codes[0]}: {printed[-400:]}"] if wrong else []


def may_mount() -> bool:
    """Returns whether this user may mount file systems."""
    return os.geteuid() == 0


@contextlib.contextmanager
def mounted(place: Path, options: str) -> Iterator[None]:
    """Mounts a file system in memory on a folder while the block runs."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
