"""The real command with real launchers: train, kill, resume, stop, evaluate."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from support.tiny import tiny_recipe

from smoe_train.reporting import METRICS, ROUTING, read_records

COMMAND = [sys.executable, "-m", "smoe_train.cli.app"]
TWO = ["--nproc", "2", "parallel.expert_parallel_size=2"]


@pytest.fixture
def recipe(tmp_path: Path, text: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_recipe(text).to_yaml(), encoding="utf-8")
    return path


def run(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*COMMAND, *arguments], cwd=cwd, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == code, f"exit code {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


def figures(run_folder: Path) -> list[dict[str, Any]]:
    """Returns all records without times; floats compare bit for bit."""
    timed = ("step_seconds", "seconds")
    return [{k: v for k, v in record.items() if k not in timed} for record in read_records(run_folder / METRICS)]


def start_and_signal(arguments: list[str], cwd: Path, ready: Callable[[], bool], number: signal.Signals) -> int:
    """Starts a run, sends a signal as soon as it is ready for it, and returns the exit code.

    SIGKILL goes to every process of the run, as a power cut would; other signals to the command alone.
    """
    process = subprocess.Popen([*COMMAND, *arguments], cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, f"ended with {process.returncode} before the signal"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if number == signal.SIGKILL:
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            one.kill()
    else:
        process.send_signal(number)
    return process.wait(timeout=120)


def test_kill_and_resume_give_the_uninterrupted_run(tmp_path: Path, recipe: Path) -> None:
    long = ["training.max_steps=40", "reporting.log_every_steps=1", *TWO]
    run("train", str(recipe), "name=straight", *long, cwd=tmp_path)
    folder = tmp_path / "runs" / "killed"
    for at_least in (5, 17):  # the second kill hits a resumed run

        def advanced(least: int = at_least) -> bool:
            path = folder / METRICS
            return path.exists() and any(f'"step": {step},' in path.read_text() for step in range(least, least + 9))

        code = start_and_signal(["train", str(recipe), "name=killed", *long], tmp_path, advanced, signal.SIGKILL)
        assert code == -signal.SIGKILL
    run("train", str(recipe), "name=killed", *long, "--resume", "auto", cwd=tmp_path)
    assert figures(folder) == figures(tmp_path / "runs" / "straight")
    steps = [record["step"] for record in figures(folder) if record["split"] == "train"]
    assert steps == list(range(1, 41))
    straight = read_records(tmp_path / "runs" / "straight" / ROUTING)
    assert read_records(folder / ROUTING) == straight
    assert (folder / "report" / "report.html").is_file()
    assert json.loads((folder / "environment.json").read_text())["topology"]["world_size"] == 2


def test_a_stopped_run_says_75_and_resumes(tmp_path: Path, recipe: Path) -> None:
    long = ["training.max_steps=400", "evaluation.every_steps=400", "checkpoint.every_steps=400", *TWO]
    folder = tmp_path / "runs" / "tiny"

    def started() -> bool:
        return (folder / METRICS).exists() and (folder / METRICS).stat().st_size > 0

    assert start_and_signal(["train", str(recipe), *long], tmp_path, started, signal.SIGTERM) == 75
    (latest,) = (folder / "checkpoints").glob("step-*")
    reached = int(latest.name.removeprefix("step-"))
    assert 0 < reached < 400
    assert [record["step"] for record in figures(folder)] == list(range(1, reached + 1))
    longer = [f"training.max_steps={reached + 2}", *long[1:]]
    run("train", str(recipe), *longer, cwd=tmp_path)
    steps = [record["step"] for record in figures(folder) if record["split"] == "train"]
    assert steps == list(range(1, reached + 3))


@pytest.mark.parametrize("launcher", [[], ["--launcher", "deepspeed"]], ids=["in_process", "deepspeed"])
def test_launchers_evaluation_and_generation(tmp_path: Path, recipe: Path, launcher: list[str]) -> None:
    topology = TWO if launcher else []
    run("train", str(recipe), *topology, *launcher, cwd=tmp_path)
    folder = tmp_path / "runs" / "tiny"
    valid = [record for record in figures(folder) if record["split"] == "valid"][-1]
    processes = ["--nproc", "2"] if launcher else []
    arguments = ["evaluate", str(folder), "--top-k", "2,8", "--max-tokens", "300", "--json", *processes]
    result = json.loads(run(*arguments, cwd=tmp_path).stdout)
    assert [score["top_k"] for score in result["scores"]] == [2, 8]
    assert result["scores"][0]["bits_per_byte"] == pytest.approx(valid["bits_per_byte"], rel=1e-5)
    assert result["scores"][1]["loss"] != result["scores"][0]["loss"]
    if not launcher:
        arguments = ["generate", str(folder), "--prompt", "the router", "--max-new-tokens", "12", "--json"]
        texts = [json.loads(run(*arguments, "--seed", seed, cwd=tmp_path).stdout)["text"] for seed in ("1", "1", "2")]
        assert texts[0] == texts[1] != texts[2]
        assert all(one.startswith("the router") and len(one.encode()) > 12 for one in texts)


def test_three_mistakes_at_once_leave_nothing_behind(tmp_path: Path, recipe: Path) -> None:
    values = yaml.safe_load(recipe.read_text())
    values["model"]["moe"]["router"]["hyper_hiden"] = 4
    values["training"]["max_steps"] = "many"
    values["parallel"]["expert_parallel_size"] = 3
    recipe.write_text(yaml.safe_dump(values))
    done = run("train", str(recipe), "--nproc", "2", cwd=tmp_path, code=2)
    assert "3 problems" in done.stderr
    assert "model.moe.router.hyper_hiden: unknown key; did you mean 'hyper_hidden'?" in done.stderr
    assert "training.max_steps: input should be a valid integer (got 'many')" in done.stderr
    assert "parallel.expert_parallel_size" in done.stderr
    assert "valid for 2 processes and 8 experts: 1, 2" in done.stderr
    assert all(f"{recipe.name}:" in line for line in done.stderr.splitlines()[1:4])
    assert not (tmp_path / "runs").exists()


def test_a_failing_worker_shows_its_own_traceback(tmp_path: Path, recipe: Path) -> None:
    """The failure happens on rank 1 alone; the parent prints it and ends the other rank."""
    hook = tmp_path / "sitecustomize.py"
    hook.write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import smoe_train.training.trainer as t\n"
        "    def fail(self): raise RuntimeError('rank one has had enough')\n"
        "    t.Trainer.train = fail\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    started = time.monotonic()
    done = subprocess.run(
        [*COMMAND, "train", str(recipe), *TWO],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "rank 1 failed" in done.stderr
    assert "rank one has had enough" in done.stderr
    assert time.monotonic() - started < 90
